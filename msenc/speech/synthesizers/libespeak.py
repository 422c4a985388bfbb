"""eSpeak NG through ctypes: text and voice settings in, samples or phonemes out.

The library keeps state between two calls (the phase of its pitch flutter, among others), so the same words sound
slightly different the second time. Here it is loaded and unloaded again for each utterance, which costs some
milliseconds and makes the samples a function of the arguments, save for voices with breath (``f2``, ``f3``, ``f5``
and some others), whose noise comes from memory that was never written.
"""

import ctypes
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from msenc.types import MsencError, needing

# Values of speak_lib.h.
_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_IPA = 2
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4

_LOCK = threading.Lock()  # one utterance of a process at a time: the state is the library's, not the caller's

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class VoiceSettings:
    """How an utterance is spoken.

    Args:
        voice: eSpeak's voice name with its variant, such as ``en-us+f2``.
        pitch: 0 to 99; 50 is the voice's own pitch.
        pitch_range: 0 to 99; 0 is monotone.
        rate_wpm: words per minute.
    """

    voice: str
    pitch: int = 50
    pitch_range: int = 50
    rate_wpm: int = 250


def load_espeak() -> ModuleType:
    """The loader's module, or the refusal that names the extra it belongs to."""
    with needing("speech by eSpeak NG, the demo's among it,", "demo"):
        import espeakng_loader
    return espeakng_loader


def speak(text: str, settings: VoiceSettings) -> tuple[np.ndarray, int]:
    """Synthesise one utterance; equal arguments give equal samples, whatever was spoken before.

    Args:
        text: what is said.
        settings: the voice.

    Returns:
        Samples as float32 in [-1, 1], shape (N,), and their rate in Hz.

    Raises:
        MsencError: if the library is missing, in use elsewhere in this process, or refuses the voice.
    """
    (samples,), rate = speak_in_turn(text, [settings])
    return samples, rate


def speak_in_turn(text: str, voices: Sequence[VoiceSettings]) -> tuple[list[np.ndarray], int]:
    """Say one text in several voices, in less time than `speak` takes for each: starting the library costs the most.

    The first sounds as by `speak`; a later one also depends, by a few samples, on those before it.

    Returns:
        Samples of each, and their rate; raises as `speak`.
    """
    loader = load_espeak()
    path = loader.get_library_path()
    with _LOCK:
        if _is_loaded(path):
            raise MsencError(
                "eSpeak NG is already loaded in this process, so its state is not known and its speech would not be "
                "reproducible. Speak in a process of its own; the demo does with num_workers of 1 or more."
            )
        library = _load(path)
        try:
            return _speak_with(library, loader.get_data_path(), text, voices)
        finally:
            _unload(library)


def to_phonemes(texts: Sequence[str], voice: str = "en-us") -> list[str]:
    """Texts -> IPA, as eSpeak NG would speak them; clauses are joined by a space.

    Raises:
        MsencError: if the library is missing, or has no such voice.

    Example:
        >>> to_phonemes(["Hello."])
        ['həlˈoʊ']
    """
    loader = load_espeak()
    with _LOCK:
        return _phonemes_with(_load(loader.get_library_path()), loader.get_data_path(), texts, voice)


def _phonemes_with(library: ctypes.CDLL, data_path: str, texts: Sequence[str], voice: str) -> list[str]:
    library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
    library.espeak_TextToPhonemes.argtypes = [ctypes.POINTER(ctypes.c_char_p), ctypes.c_int, ctypes.c_int]
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    try:
        library.espeak_Initialize(_SYNCHRONOUS, 0, data_path.encode(), _DONT_EXIT)
        try:
            if library.espeak_SetVoiceByName(voice.encode()) != 0:
                raise MsencError(f"eSpeak NG has no voice {voice!r}. Choose one of its voices.")
            return [_clauses_to_phonemes(library, text) for text in texts]
        finally:
            library.espeak_Terminate()
    finally:
        _unload(library)


def _clauses_to_phonemes(library: ctypes.CDLL, text: str) -> str:
    rest = ctypes.c_char_p(text.replace("\0", " ").encode())
    clauses = []
    while rest.value:  # each call moves it behind a clause; at the end it is NULL
        clauses.append((library.espeak_TextToPhonemes(ctypes.byref(rest), _CHARS_UTF8, _IPA) or b"").decode())
    return " ".join(clause.strip() for clause in clauses if clause.strip())


def _speak_with(
    library: ctypes.CDLL, data_path: str, text: str, voices: Sequence[VoiceSettings]
) -> tuple[list[np.ndarray], int]:
    library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
    library.espeak_SetParameter.argtypes = [ctypes.c_int] * 3
    library.espeak_SetSynthCallback.argtypes = [_CALLBACK]
    library.espeak_SetSynthCallback.restype = None
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data_path.encode(), _DONT_EXIT)
    if rate <= 0:
        raise MsencError(f"eSpeak NG found no usable data in {data_path} (code {rate}). Reinstall espeakng-loader.")
    spoken: list[list[np.ndarray]] = []

    def keep(samples, count, events) -> int:
        if samples and count > 0:
            spoken[-1].append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = _CALLBACK(keep)  # kept by name: ctypes holds no reference of its own
    try:
        library.espeak_SetSynthCallback(callback)
        words = text.encode() + b"\0"
        for settings in voices:
            code = library.espeak_SetVoiceByName(settings.voice.encode())
            if code != 0:
                raise MsencError(f"eSpeak NG has no voice {settings.voice!r} (code {code}). Choose one of its voices.")
            for parameter, value in (
                (_RATE, settings.rate_wpm),
                (_VOLUME, 100),
                (_PITCH, settings.pitch),
                (_RANGE, settings.pitch_range),
            ):
                library.espeak_SetParameter(parameter, value, 0)
            spoken.append([])
            code = library.espeak_Synth(words, len(words), 0, 1, 0, _CHARS_UTF8, None, None)
            if code != 0 or not spoken[-1]:
                raise MsencError(f"eSpeak NG gave no sound for {text!r} (code {code}). Expected words to speak.")
    finally:
        library.espeak_Terminate()
    return [np.concatenate(chunks).astype(np.float32) / 32768 for chunks in spoken], rate


def _load(path: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise MsencError(f"Could not load eSpeak NG from {path}: {error}. Reinstall espeakng-loader.") from error


def _is_loaded(path: str) -> bool:
    if not hasattr(os, "RTLD_NOLOAD"):
        return False
    try:
        library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    _unload(library)  # the question itself counts as one use
    return True


def _unload(library: ctypes.CDLL) -> None:
    import _ctypes

    close = getattr(_ctypes, "dlclose", None) or _ctypes.FreeLibrary
    close(library._handle)
