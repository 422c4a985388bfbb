"""The words in which people describe a voice: what each states, or implies. `msenc.speech.description` reads with them.

A table's key is what its words say (``loudness=loud``, or several). In its words a space also stands for a hyphen, a
verb stands for all its forms, and an adjective for its adverb too, unless it ends in "=". Words that could mean two
attributes ("a low voice": deep, or quiet?) stand in none.
"""

from collections.abc import Iterator
from typing import NamedTuple

from msenc.types import MsencError


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


class Words(NamedTuple):
    """Words of one meaning.

    Args:
        adjectives: divided by spaces, hyphens inside; their adverbs are formed.
        verbs: base forms, divided by spaces; all forms are formed.
        phrases: regular expressions, with ``{names}`` of `PARTS`.
    """

    adjectives: str = ""
    verbs: str = ""
    phrases: tuple[str, ...] = ()


DEGREES = (
    "very|quite|rather|really|real|dead|deadly|truly|absolutely|utterly|extremely|so|too|particularly|especially|"
    "exceptionally|remarkably|incredibly|unusually|"
    "notably|noticeably|distinctly|clearly|pretty|super|highly|overly|exceedingly|awfully|terribly|painfully|at all|"
    "all|most|more|much|ever|always|constantly|consistently|generally|mostly|usually"
)

PARTS = {
    "degree": f"(?:(?:{DEGREES}) ){{0,3}}",
    "mid": "(?:medium|moderate|average|normal|regular|mid|middle|middling|ordinary|usual|standard|typical|intermediate|"
    "conversational|reasonable)",
    "is": "(?: of (?:\\w+ )?(?:voice|speech|speaking|delivery|recording))?(?: (?:is|was|are|were|remains?|stays?|"
    "sounds?|seems?|being)|[:=]| [=-])",
    "whose": "(?:his|her|their|its|the|one's|my|your|a)",
    "pace": "(?:pace|speed|rate|tempo|clip|rhythm|cadence|(?:speech|speaking|talking) (?:rate|speed|pace|tempo)|"
    "(?:rate|speed|pace|tempo) of (?:speech|speaking|delivery))",
    "pitch": "(?:pitch|register|octave|pitch level)",
    "volume": "(?:volume|loudness|volume level|sound level|vocal energy|energy)",
    "melody": "(?:intonation|inflections?|melody|pitch range|expression|expressiveness|expressivity|modulation|prosody|"
    "(?:pitch|tonal|vocal|melodic) (?:variation|variety|movement|range)|variation)",
    "feeling": "(?:emotions?|feelings?|expression|passion|inflection|intonation|melody|modulation|variation)",
    "pauses": "(?:(?:short|brief|small|noticeable|audible|obvious|awkward|natural|real|clear|tiny) )*"
    "(?:pauses?|breaks?|hesitations?|gaps?|silences|interruptions?|pausing|hesitating|stopping)",
    "noise": "(?:(?:\\w+ )?(?:noises?(?: level)?(?: in the background)?|"
    "hiss|static|interference|hum|crackle|crackling|hubbub|din|racket|clatter)|"
    "(?:background|ambient) (?:\\w+ )?(?:sounds?|music|chatter|voices|traffic|talk)|"
    "(?:music|chatter|traffic|voices|sounds?) in the background)",
    "sound": "(?:recording|audio|sound|signal|sound quality|audio quality|recording quality|clip|track|line|take)",
    "place": "(?:room|place|studio|environment|setting|surroundings?|background|office|space|acoustics?|location|hall|"
    "booth|cafe|caf\u00e9|restaurant|bar|pub|street|station|crowd|party|kitchen|classroom|house|home|car)",
    "much": "(?:strong|much|a lot of|lots of|loud|heavy|considerable|significant|high|intense|plenty of|constant|"
    "a great deal of|substantial|severe|audible|noticeable|terrible|too much|so much)",
    "slight": "(?:slight|some|a (?:little )?bit of|a little|little|light|faint|mild|a bit of|minor|low|soft|minimal|"
    "subtle|quiet|moderate|a touch of|a hint of|slightly audible)",
    "none": "(?:no|without|zero|free (?:of|from)|lacking|devoid of|absence of|hardly|with no)",
}
"""Parts of phrases."""

STATED: dict[str, Words] = {
    "gender=woman": Words(
        phrases=(
            "wom[ae]n(?:'s|s)?|females?|she(?:'s|'ll|'d)?|hers?|herself|lady|ladies|girls?|mother|mum|mom|mummy|"
            "mommy|grandmother|"
            "grandma|granny|wife|sister|daughter|aunt|niece|queen|princess|actress|waitress|feminine|schoolgirl|"
            "girlfriend|gal|nun|mrs|ms|madam",
            "(?:lady|girl|mother|mum|mom|grandmother|grandma|granny|wife|sister|daughter|aunt|niece|queen|actress)'s",
        )
    ),
    "gender=man": Words(
        phrases=(
            "m[ae]n(?:'s|s)?|males?|he(?:'s|'ll|'d)?|his|him|himself|gentlem[ae]n|guys?|boys?|father|dad|daddy|"
            "grandfather|"
            "grandpa|grandad|husband|brother|son|uncle|nephew|king|prince|waiter|masculine|schoolboy|boyfriend|lad|"
            "bloke|chap|dude|fellow|monk|mr|sir",
            "(?:gentleman|guy|boy|father|dad|grandfather|grandpa|husband|brother|son|uncle|nephew|king|lad|bloke|"
            "chap)'s",
        )
    ),
    "pitch=low": Words(
        phrases=(
            "{degree}(?:low|deep)(?:er|est)? {pitch}",
            "{degree}(?:low|deep)(?:er)? ?(?:pitched|toned|register|voiced)(?: voice)?",
            "{pitch}{is} {degree}(?:low|deep)",
            "{pitch} {degree}(?:low|deep)(?=$|[^\\w\\s]| and| but| with)",
            "{degree}deep (?:voice|tone|timbre)s?",
            "low frequency|{degree}(?:low|deep) in pitch",
            "(?:bass|basso|baritone)(?: voice| tone| register)?",
            "(?:lower|bottom) end of {whose} (?:voice|range|register)",
        ),
        adjectives="deep= rumbling sepulchral",
    ),
    "pitch=medium": Words(
        phrases=(
            "{degree}{mid} {pitch}",
            "{degree}{mid} pitched(?: voice)?",
            "{pitch}{is} {degree}{mid}",
            "{pitch} {degree}{mid}(?=$|[^\\w\\s]| and| but| with)",
            "mid range (?:voice|pitch)|{mid} in pitch",
            "(?:{pitch} (?:is |was |that is |that's )?)?neither (?:an? )?{degree}(?:high|low|deep)(?: pitched)?(?: "
            "pitch| voice)? (?:nor|or) "
            "(?:an? )?{degree}(?:low|high|deep)(?: pitched)?(?: in)?(?: pitch| voice)?(?!(?: in)? (?:volume|loudness|"
            "speed))",
            "moderately (?:high|low|deep)(?: pitch(?:ed)?)?(?: voice)?",
        )
    ),
    "pitch=high": Words(
        phrases=(
            "{degree}high(?:er|est)? {pitch}",
            "{degree}high(?:er)? ?(?:pitched|toned|voiced)(?: voice)?",
            "{pitch}{is} {degree}high",
            "{pitch} {degree}high(?=$|[^\\w\\s]| and| but| with)",
            "{degree}high voice",
            "voice is {degree}high",
            "high frequency|{degree}high in pitch",
            "falsetto|soprano|treble",
            "(?:upper|top) end of {whose} (?:voice|range|register)",
        ),
        adjectives="shrill squeaky piping",
        verbs="squeak squeal",
    ),
    "range=flat": Words(
        adjectives="flat monotonous monotonic inexpressive unexpressive expressionless emotionless unemotional "
        "passionless "
        "unvarying unvaried robotic mechanical wooden lifeless toneless droning deadpan impassive dispassionate "
        "colourless colorless unanimated uninflected unmodulated feelingless",
        verbs="drone",
        phrases=(
            "monotones?(?: voice| delivery)?|deadpan|monotony",
            "very evenly",
            "(?:even|level|steady|dull|single|unchanging|constant) (?:voice|tone|intonation|pitch|note)",
            "(?:narrow|limited|little|minimal|small|low|reduced) {melody}",
            "{melody}{is} {degree}(?:flat|narrow|limited|minimal|low|small)",
            "(?:no|without|lack(?:s|ing)?|devoid of|void of|free of|not a (?:trace|hint) of|hardly|barely|little|"
            "with no|"
            "zero|minimal)(?: any| much| (?:a )?(?:trace|hint|shred|bit|sign)s? of(?: any)?| in| of)? {feeling}",
            "(?:pitch|tone|intonation|voice|inflection|melody) (?:barely|hardly|never|scarcely|rarely|does not|"
            "doesn't|did not|didn't) (?:ever )?(?:var(?:y|ies|ied)|chang(?:es?|ed)|moves?|moved|ris(?:es?|ing))",
            "on (?:a single|one|the same) (?:note|tone|pitch)",
            "(?:like|as) a (?:robot|machine)|machine like|robot like|matter of fact(?:ly)?|flat(?:ly)? (?:toned|"
            "voiced)",
        ),
    ),
    "range=moderate": Words(
        phrases=(
            "moderate(?:ly expressive)? (?:intonation|expression|expressivity|expressiveness|inflection|melody)",
            "(?:moderately|reasonably) (?:expressive|lively|animated|varied|melodic)(?:ly)?",
            "{mid} {melody}",
            "{melody}{is} {degree}{mid}",
            "(?:some|a little|occasional) {melody}",
        )
    ),
    "range=expressive": Words(
        adjectives="expressive animated vivid melodic melodious theatrical dramatic vivacious spirited passionate "
        "impassioned "
        "emotional emotive colourful colorful lilting singsong sing-song exuberant lively dynamic operatic "
        "well-modulated emphatic",
        phrases=(
            "(?:wide|broad|large|varied|lively|animated|rich|great|much|a lot of|lots of|plenty of|strong|dynamic|high|"
            "vivid|marked|rising and falling|pronounced|exaggerated|wide ranging) {melody}",
            "{melody}{is} {degree}(?:wide|broad|large|varied|lively|animated|rich|strong|dynamic|high|expressive)",
            "(?:with|full of|filled with|lots of|much|great|a lot of|plenty of|rich in|real|deep|strong)(?: (?!no|"
            "little|some|any|minimal|hardly|barely|less|limited|faint|flat|zero|false)\\w+)? "
            "(?:emotions?|feelings?|expression|passion)",
            "(?:pitch|tone|intonation|inflection|melody)(?: really)? (?:varies|varied|changes|moves|rises and falls|"
            "fluctuates|swings)(?: (?:a lot|widely|greatly|much|strongly|wildly|often|up and down))?",
            "full of life|ups and downs|up and down",
            "expressively|varied (?:tone|voice)|(?:varies|varying) {whose} (?:pitch|tone|intonation)",
        ),
    ),
    "rate=slow": Words(
        adjectives="slow lazy languid languorous unhurried leisurely sluggish plodding ponderous slow-paced "
        "slow-moving drawn-out lumbering "
        "slothful deliberate unrushed",
        verbs="drawl plod dawdle",
        phrases=(
            "{degree}(?:slow|low|leisurely|relaxed|unhurried|gentle|sluggish|calm|glacial) {pace}",
            "{pace}{is} {degree}(?:slow|low|leisurely|unhurried|sluggish)",
            "{pace} {degree}(?:slow)(?=$|[^\\w\\s]| and| but| with)",
            "slow (?:spoken|talking|speaking|voiced|tongued)",
            "(?:tak(?:es?|ing)|took) {whose} (?:own )?(?:sweet )?time",
            "(?:drag(?:s|ging|ged)?|draw(?:s|ing|n)?|drew|stretch(?:es|ing|ed)?)(?: out)? {whose} (?:words|vowels|"
            "syllables|sentences)(?: out)?|drawn out",
            "without (?:any )?(?:hurry|haste|rush|hurrying|rushing)|(?:in no|not in a) (?:hurry|rush)|at (?:a "
            ")?snail's pace|in slow motion",
            "word by word",
        ),
    ),
    "rate=moderate": Words(
        phrases=(
            "{degree}{mid} {pace}",
            "(?:steady|even|natural|comfortable) {pace}|(?:steadily|evenly|normally) paced",
            "{pace}{is} {degree}{mid}",
            "{pace} {degree}{mid}(?=$|[^\\w\\s]| and| but| with)",
            "{pace}{is} neither {degree}(?:high|low|fast|slow|quick) (?:nor|or) {degree}(?:high|low|fast|slow|quick)",
            "(?:moderately|medium|reasonably) (?:fast|slow|quick|rapid|paced)(?:ly)?(?: {pace})?",
        )
    ),
    "rate=fast": Words(
        adjectives="fast quick rapid brisk swift speedy hasty fast-paced quick-paced rapid-fire quick-fire fast-moving "
        "breakneck hurried rushed precipitate lightning-fast",
        verbs="rush hurry gabble jabber prattle babble chatter race gallop blurt",
        phrases=(
            "{degree}(?:fast|quick|rapid|brisk|high|swift|breakneck|lightning|record|great|lively|full|top|hurried|"
            "furious|"
            "breathless) {pace}",
            "{pace}{is} {degree}(?:fast|quick|rapid|brisk|high|swift|hurried)",
            "{pace} {degree}(?:fast|quick|rapid|high)(?=$|[^\\w\\s]| and| but| with)",
            "(?:fast|quick) (?:spoken|talking|speaking|tongued)",
            "(?:at|with|in) (?:speed|haste)|in (?:a|great) (?:hurry|rush|haste)|a mile a minute|like (?:a )?machine "
            "guns?|nineteen to the dozen",
            "rattl(?:es?|ing|ed)(?: off| on)?",
        ),
    ),
    "loudness=quiet": Words(
        adjectives="quiet soft hushed muted subdued faint inaudible whispery soft-spoken softly-spoken "
        "quietly-spoken quiet-spoken low-volume",
        verbs="whisper murmur mutter mumble susurrate",
        phrases=(
            "{degree}soft(?:ly)? (?:voice|tone|volume|spoken|voiced)",
            "{degree}(?:low|small|soft|quiet|reduced|minimal) {volume}",
            "{volume}{is} {degree}(?:low|soft|quiet|small)",
            "{volume} {degree}(?:low|soft)(?=$|[^\\w\\s]| and| but| with)",
            "(?:under|below|beneath) {whose} breath|sotto voce",
            "(?:barely|hardly|scarcely|almost in|nearly in|just|not quite) ?(?:audible|audibly|above a whisper)",
            "(?:lower|drop|hush)(?:s|ped|ping|ed|ing|es)? {whose} voice|(?:with )?{whose} voice (?:lowered|dropped|"
            "hushed)|lowered voice|keep(?:s|ing)? {whose} voice (?:down|low)",
            "(?:barely|hardly|scarcely|just) (?:an? )?(?:whisper|murmur|mutter|mumbl)\\w*",
            "undertones?|in a small voice|{degree}tiny voice|stage whisper",
        ),
    ),
    "loudness=moderate": Words(
        phrases=(
            "{degree}{mid} {volume}",
            "{volume}{is} {degree}{mid}",
            "{volume} {degree}{mid}(?=$|[^\\w\\s]| and| but| with)",
            "(?:moderately|reasonably) (?:loud|quiet|soft)(?:ly)?",
            "comfortable {volume}",
            "{volume}{is} neither {degree}(?:high|low|loud|quiet|soft) (?:nor|or) {degree}(?:high|low|loud|quiet|soft)",
            "neither (?:an? )?{degree}(?:high|low) (?:nor|or) (?:an? )?{degree}(?:high|low)(?: in)? {volume}",
        )
    ),
    "loudness=loud": Words(
        adjectives="loud deafening thunderous stentorian vociferous ear-splitting earsplitting boisterous raucous "
        "booming blaring loud-mouthed full-throated lusty clamorous loud-voiced strident",
        verbs="shout yell scream bellow holler shriek screech bawl thunder roar howl exclaim boom blare declaim "
        "proclaim",
        phrases=(
            "{degree}(?:high|loud|full|great|maximum|top|elevated|considerable|deafening) {volume}",
            "{volume}{is} {degree}(?:high|loud)",
            "{volume} {degree}high(?=$|[^\\w\\s]| and| but| with)",
            "(?:rais(?:es?|ing|ed)) {whose} voice|(?:with )?{whose} voice raised|raised voice",
            "at the top of {whose} (?:lungs|voice)|out loud|aloud|call(?:s|ing|ed)? out|cr(?:y|ies|ying|ied) out|"
            "noisily",
            "loud mouthed",
        ),
    ),
    "pauses=few": Words(
        adjectives="fluent uninterrupted continuous unbroken nonstop non-stop unceasing ceaseless flowing",
        phrases=(
            "{degree}few {pauses}",
            "(?:almost |virtually |practically |nearly |absolutely )?(?:hardly any|almost no|no|without|barely any|"
            "scarcely any|"
            "next to no|never|rarely|seldom|hardly|barely|hardly ever|not|doesn't|does not|minimal|very little|"
            "little)(?: a| any| a single| much| ever| even| once| many| taking a| making| taking)* {pauses}",
            "(?:never|rarely|seldom|hardly|barely|hardly ever|doesn't|does not|scarcely)(?: ever| once| even)? "
            "(?:pauses?|stops?|hesitates?|breaks?|takes? a breath|draws? breath)",
            "without (?:taking |drawing )?(?:a )?breath|in (?:one|a single) breath|without (?:a )?(?:stop|break|let "
            "?up)|non stop",
            "paus(?:es?|ing|ed) (?:only )?(?:rarely|seldom|infrequently|little|hardly ever)",
            "{pauses}{is} (?:few|rare|scarce|seldom|infrequent)|(?:rare|infrequent) {pauses}",
        ),
    ),
    "pauses=some": Words(
        phrases=(
            "(?:some|occasional|a few|several|the odd|the occasional|sporadic|a couple of|a number of|a pause or two|"
            "{mid}) {pauses}|with pauses|{mid} number of {pauses}",
            "paus(?:es?|ing|ed) (?:occasionally|sometimes|(?:every )?now and (?:then|again)|here and there|from time "
            "to time|at times|once or twice|once in a while|every so often)",
            "(?:occasionally|sometimes) paus(?:es?|ing|ed)",
        )
    ),
    "pauses=many": Words(
        adjectives="hesitant halting faltering stop-and-go stop-start choppy stammering stuttering",
        verbs="stammer stutter falter hesitate",
        phrases=(
            "{degree}(?:many|frequent|lots of|a lot of|numerous|constant|plenty of|repeated|long|lengthy|countless|"
            "too many|so many|regular) {pauses}",
            "(?:paus(?:es?|ing|ed)|stop(?:s|ping|ped)) (?:{degree})(?:often|frequently|a lot|repeatedly|constantly|"
            "regularly|many times|all "
            "the time|"
            "after (?:every|each)|between (?:the |every |each |his |her )?(?:words?|phrases?|sentences?)|for long|at "
            "length)(?: \\w+)?",
            "(?:often|frequently|repeatedly|constantly|regularly|always) paus(?:es?|ing|ed)|(?:keeps|kept|keep) "
            "(?:on )?(?:pausing|stopping|hesitating)",
            "in fits and starts|with (?:(?!no|little|hardly|few|any|some|minimal|zero)\\w+ )?hesitations?|full of "
            "(?:pauses|hesitations?)",
            "{pauses}{is} {degree}(?:many|frequent|long|numerous)",
        ),
    ),
    "noise=noisy": Words(
        phrases=(
            "{degree}noisy(?: {sound}| {place}| \\w+ {place})?",
            "{much} {noise}",
            "{noise}{is} {degree}(?:loud|strong|high|heavy)",
            "(?:crackl(?:y|ing)|hissy|hissing|grainy|distorted|bad|poor|low quality|poor quality) {sound}",
            "(?:poor|bad|low) (?:recording|audio|sound) quality",
            "{degree}(?:loud|crowded|busy|bustling) {place}",
            "full of (?:\\w+ )?noise|static filled|noise filled",
            "loud (?:\\w+ )?(?:music|traffic|chatter)(?: in the background)?",
        )
    ),
    "noise=slight": Words(
        phrases=(
            "{slight} {noise}",
            "(?:slightly|a little(?: bit)?|a bit|mildly|somewhat|moderately) noisy(?: {sound}| {place})?",
            "{noise}{is} {degree}(?:slight|low|faint|mild|minimal|soft|moderate)",
        )
    ),
    "noise=clean": Words(
        phrases=(
            "{degree}(?:clean|clear|crisp|pristine|noise free|noiseless|high quality|good quality|studio quality|"
            "crystal clear|spotless) {sound}",
            "{sound}{is} {degree}(?:clean|clear|crisp|pristine|noise free)",
            "(?:almost |virtually |practically |completely )?{none} (?:any |of |the |audible )*{noise}",
            "noise free|noiseless|free of noise|studio quality|studio recording|recorded in a studio",
            "{degree}(?:quiet|silent|soundproof(?:ed)?) {place}|(?:quiet|silent) recording",
            "(?:good|high|excellent) (?:recording|audio|sound) quality",
            "(?:recording|audio|background|room){is} {degree}(?:quiet|silent)(?: in the background)?",
        )
    ),
}
"""What words state; a statement outweighs what others imply."""

MOODS: dict[str, Words] = {
    "loudness=loud rate=fast range=expressive": Words(
        "angry frustrated annoyed exasperated furious irate enraged outraged livid raging irritated indignant "
        "wrathful heated hot-tempered aggressive "
        "hostile infuriated ecstatic energetic enthusiastic excited elated thrilled overjoyed euphoric agitated "
        "frantic hysterical exhilarated triumphant",
        "anger rant rage fume rave snap enthuse gush",
        (
            "(?:anger|frustration|exasperation|fury|rage|wrath|excitement|enthusiasm|energy|exhilaration|ecstasy|hysteria|aggression)",
        ),
    ),
    "pitch=high range=expressive": Words(
        "happy cheerful joyful joyous merry jolly cheery upbeat delighted gleeful bubbly chirpy playful amused "
        "surprised astonished amazed bright perky jubilant glad",
        "laugh giggle chuckle chirp gasp rejoice",
        ("(?:joy|happiness|delight|glee|amusement|surprise|astonishment|amazement|laughter|cheer|cheerfulness)",),
    ),
    "pitch=high rate=fast": Words(
        "afraid fearful scared terrified frightened panicked panicky alarmed nervous anxious worried tense jittery "
        "stressed panic-stricken petrified",
        "panic",
        ("panick(?:ed|ing)|(?:fear|terror|panic|fright|anxiety|nervousness|alarm|dread)",),
    ),
    "loudness=quiet rate=slow range=flat": Words(
        "sad tearful disappointed sorrowful mournful gloomy melancholy melancholic depressed dejected downcast "
        "despondent unhappy miserable "
        "heartbroken forlorn tired weary exhausted sleepy drowsy fatigued listless lethargic grieving dispirited "
        "wistful somber sombre glum",
        "mourn grieve sob weep cry",
        ("(?:sadness|sorrow|grief|gloom|melancholy|misery|despair|fatigue|exhaustion|weariness|dejection)",),
    ),
    "rate=slow range=flat": Words(
        "bored apathetic indifferent disinterested uninterested lackadaisical", "", ("(?:boredom|apathy|indifference)",)
    ),
    "loudness=quiet rate=slow": Words(
        "tender gentle soothing calm serene tranquil peaceful relaxed loving affectionate comforting intimate",
        "",
        ("(?:tenderness|calmness|serenity|affection)",),
    ),
    "loudness=quiet": Words(
        "shy timid bashful meek secretive conspiratorial demure",
        "croon coo purr",
        ("(?:shyness|timidity)|in (?:secret|confidence)",),
    ),
}
"""Moods, and what of a voice goes with them: of Juslin and Laukka (Psychological Bulletin 2003, tables 7 and 8) what
most studies agree on; boredom after Scherer (Speech Communication 2003)."""

AGES: dict[str, Words] = {
    "pitch=high": Words(
        "childish childlike child-like",
        "",
        (
            "(?:child|children|kid|toddler|infant|preschooler|pre teen)s?(?:'s)?",
            "(?:little|small|young) (?:girl|boy)'?s?",
        ),
    ),
    "rate=slow": Words("elderly aged geriatric", "", ("old (?:man|woman|lady|gentleman|age)", "senior citizen")),
}
"""Ages, likewise (Linville, Vocal Aging, 2001); a mood outweighs them."""

HEADS = _set(
    "voice voices tone tones pitch pace speed rate tempo rhythm cadence delivery manner way fashion style intonation "
    "melody inflection volume level loudness speech speaking talk talking talker register timbre words word sentence "
    "sentences phrases utterance utterances whisper murmur shout growl mumble drawl scream yell monotone bass "
    "baritone falsetto expression recording audio sound sounding spoken speaker narrator person man woman girl boy "
    "lady guy male female gentleman child kid individual someone reader teenager teen youth adult toddler teacher "
    "preacher salesman reply answer accent quality mood articulation diction pronunciation statement remark turn line "
    "lines conversation narration narrative reading performance clip one fellow lad bloke"
)
"""What an adjective has to describe, to be one of the voice: "a loud shirt" says nothing of how one speaks."""

NEUTRAL = _set(
    "a an the this that these those and but with in at of to from by for as while when who whom whose which is are "
    "was were be been being has have had does do did can could may will would it its i you we they them their theirs "
    "themself themselves there here on into through over about also too very quite rather really extremely so even "
    "still yet both voice voices tone tones manner way fashion style delivery sounding sound sounds sounded speak "
    "speaks speaking spoke spoken talk talks talking talked say says saying said tell tells telling told speech utter "
    "utters uttered uttering voiced word words sentence sentences phrase line lines speaker person someone somebody "
    "one individual talker narrator narrates narrating reads reading heard hear hears listen using uses use used "
    "gives giving give having well it's seems seem seeming appears like such quality overall recording audio clip "
    "reply replies replying replied answers answering answered answer responds responding responded delivers "
    "delivering delivered describes characterised characterized then together slightly somewhat fairly bit little "
    "kind sort pretty my your our her his pitch pace speed rate tempo volume loudness level register intonation not "
    "no nor neither or if than never without utterance voice's speaker's person's conversation conversational turn "
    "gender male/female clearly particularly especially all most more much always generally usually mostly there's "
    "that's what's he'd it'd behind between keeps keep keeping kept sits stays stay takes take taking took got gets "
    "get something anything thing things up out away off against across adult side"
)
"""Words that say nothing of a voice by themselves."""


_COMPOUND = "(?: (?:voiced|toned|sounding|spoken|speaking|talking|tongued|paced))?"


def entries() -> Iterator[tuple[dict[str, str], int, bool, str]]:
    """What it says, its level (0 stated, 1 mood, 2 age), whether it is an adjective, and its pattern; of all words."""
    for level, table in enumerate((STATED, MOODS, AGES)):
        for key, words in table.items():
            says = dict(part.split("=") for part in key.split())
            adjectives = words.adjectives.split()
            if adjectives:
                adverbs = "|".join(_adverb(a) for a in adjectives if not a.endswith("="))
                yield says, level, False, _spaced(f"{PARTS['degree']}(?:{adverbs})")
                yield (
                    says,
                    level,
                    True,
                    _spaced(f"{PARTS['degree']}(?:{'|'.join(map(_loose, adjectives))}){_COMPOUND}"),
                )
            if more := "|".join(filter(None, (_compared(a, "er") for a in adjectives))):
                yield (
                    says,
                    level,
                    False,
                    _spaced(f"(?:much )?(?:{more}) than (?:usual|normal|average|most|typical)"),
                )
            if most := "|".join(filter(None, (_compared(a, "est") for a in adjectives))):
                yield says, level, True, f"(?:{most})"
            if words.verbs:
                verbs = "|".join(map(_forms, words.verbs.split()))
                yield says, level, False, _spaced(f"(?:(?:almost|nearly|practically) (?:an? )?)?(?:{verbs})")
            for phrase in words.phrases:
                yield says, level, False, _spaced(f"(?:{_filled(phrase)})")


def _spaced(pattern: str) -> str:
    return pattern.replace(" ", "[ -]")


def _loose(word: str) -> str:
    return word.rstrip("=").replace("-", " ?")


def _filled(phrase: str) -> str:
    for name, part in PARTS.items():
        phrase = phrase.replace(f"{{{name}}}", part)
    if "{" in phrase.replace("{0,", ""):
        raise MsencError(f"lexicon: found {phrase!r}, expected only the parts {', '.join(PARTS)}.")
    return phrase


def _adverb(adjective: str) -> str:
    adjective = _loose(adjective)
    if adjective.endswith("ly"):
        return adjective
    if adjective.endswith("y"):
        return f"{adjective[:-1]}(?:i|y)ly"
    if adjective.endswith("ic"):
        return f"{adjective}ally"
    return f"{adjective[:-1]}y" if adjective.endswith("le") else f"{adjective}ly"


def _compared(adjective: str, ending: str) -> str | None:
    """An adjective's comparative (er) or superlative (est), if it is short enough to have one."""
    if len(adjective) > 6 or "-" in adjective:
        return None
    adjective = adjective.rstrip("=")
    return f"{adjective[:-1]}i{ending}" if adjective.endswith("y") else f"{adjective}{adjective[-1]}?{ending}"


def _forms(verb: str) -> str:
    if verb.endswith("e"):
        return f"{verb[:-1]}(?:es?|ed|ing|ers?)"
    if verb.endswith("y"):
        return f"{verb[:-1]}(?:y|ies|ied|ying)"
    return f"{verb}(?:s|es|{verb[-1]}?(?:ed|ing|ers?|y))?"
