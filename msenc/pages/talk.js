// The page to talk to a run, in the browser: shows a turn at once, keeps the newest in view, plays a reply sentence by
// sentence, and hears an open microphone. The page calls talk.send*; everything else hangs on elements by their ids.
const talk = (() => {
  const find = (id) => document.getElementById(id);
  const address = (path) => new URL(path, document.baseURI).href;

  // ------------------------------------------------------------------------------------------- turns

  const file = (value) => value && { ...value, url: value.url ?? address("gradio_api/file=" + value.path) };

  const show = (chat, text, audio, video, isSpoken = false) => {
    begin();
    const content = text?.trim() ? [{ type: "text", text }] : isSpoken ? [{ type: "text", text: "…" }] : [];
    for (const one of isSpoken ? [video] : [audio, video]) if (one) content.push({ type: "file", file: file(one) });
    const said = content.length ? [...(chat ?? []), { role: "user", content, metadata: null, options: null }] : chat;
    return [said, "", "<p>Sent.</p>", "", text ?? "", audio ?? null, video ?? null, note()];
  };
  const send = (chat, text, audio, video) => [...show(chat, text, audio, video), "", null, null];
  const sendExample = (chat, text, audio, video, note) =>
    note?.refusal ? [chat, "", "", "", "", null, null, note] : show(chat, text, audio, video);
  const sendSpoken = (chat, video) => [...show(chat, "", ears.turns.shift(), video, true), null];

  // ------------------------------------------------------------------------------------------- the newest in view

  let follows = true; // until the visitor scrolls up
  const scroller = () => document.querySelector("#chat [role=log]");
  const follow = () => {
    const log = scroller();
    if (log && follows) log.scrollTop = log.scrollHeight;
  };
  const watch = () => {
    const log = scroller();
    if (!log || log.dataset.followed) return;
    log.dataset.followed = "yes";
    log.addEventListener("wheel", () => (follows = isAtEnd(log)), { passive: true });
    log.addEventListener("touchmove", () => (follows = isAtEnd(log)), { passive: true });
    log.addEventListener("scroll", () => isAtEnd(log) && (follows = true), { passive: true });
    new ResizeObserver(follow).observe(log);
    for (const kind of ["load", "loadedmetadata"]) log.addEventListener(kind, follow, true); // clips grow late
  };
  const isAtEnd = (log) => log.scrollHeight - log.scrollTop - log.clientHeight < 40;

  // ------------------------------------------------------------------------------------------- sound

  let context = null;
  let reply = null; // whose sound is played
  let pieces = []; // its decoded sentences
  let taken = 0; // how many of them the page has given
  let asked = null; // the reply to the newest turn
  const expected = new Set(); // replies that were asked for, and not stopped
  const plays = new Map(); // reply -> of each of its sentences, when it began to be heard and how long it is
  let heard = {}; // stopped reply -> seconds of it that were heard; null: none, but it was read while it was written
  let playing = new Set();
  let ends = 0; // when the last one ends, on the context's clock
  let chain = Promise.resolve();
  let sentAt = null;
  let interrupted = 0; // replies that were stopped while they were heard
  const waits = []; // seconds from sending a turn to its first sound

  const wake = () => {
    context ??= new AudioContext();
    if (context.state === "suspended") context.resume();
  };
  for (const kind of ["pointerdown", "keydown"]) document.addEventListener(kind, wake, true);

  // of: the reply that is heard for the first time
  const play = (buffer, of = null, length = buffer.duration) => {
    const source = context.createBufferSource();
    source.buffer = buffer;
    source.connect(context.destination);
    const at = Math.max(context.currentTime + 0.01, ends);
    source.start(at, 0, length);
    ends = at + length;
    if (of !== null) plays.set(of, [...(plays.get(of) ?? []), { at, length }]);
    playing.add(source);
    source.onended = () => {
      playing.delete(source);
      state();
    };
    if (of !== null && sentAt !== null) {
      waits.push((performance.now() - sentAt) / 1000 + at - context.currentTime);
      sentAt = null;
      const sorted = [...waits].sort((a, b) => a - b);
      const share = (p) => sorted[Math.ceil(p * sorted.length) - 1].toFixed(2);
      find("here").textContent =
        `From sending to sound in this browser: ${waits.at(-1).toFixed(2)} s (p50 ${share(0.5)}, p95 ${share(0.95)})`;
    }
    state();
  };
  const hush = () => {
    for (const source of playing) {
      source.onended = null;
      source.stop();
    }
    playing.clear();
    ends = 0;
    state();
  };
  const secondsHeard = (of) =>
    (plays.get(of) ?? []).reduce((sum, one) => sum + Math.max(0, Math.min(context.currentTime - one.at, one.length)), 0);
  const played = () => Object.fromEntries([...plays.keys()].map((of) => [of, heard[of] ?? secondsHeard(of)]));
  // Some replies end here, for the run as well: it is told, with the next turn or by #cut, how much of each was heard.
  const end = (replies, isRead) => {
    for (const of of replies) {
      heard[of] = isRead && !plays.has(of) ? null : secondsHeard(of);
      expected.delete(of);
    }
    hush();
  };
  const note = () => ({ reply: asked, heard: { ...heard } });
  const begin = () => {
    end([...expected].filter((of) => plays.has(of)), false); // the others are still to come
    asked = Date.now().toString(36) + Math.random().toString(36).slice(2);
    expected.add(asked);
    follows = true;
    sentAt = performance.now();
  };
  const take = () => {
    const given = [...document.querySelectorAll("#sound [data-src]")];
    if (!given.length) {
      if (pieces.length) hush(); // another talk, or turn
      pieces = [];
      return;
    }
    if (given[0].dataset.reply !== reply) [reply, pieces, taken] = [given[0].dataset.reply, [], 0];
    for (const one of given.slice(taken)) {
      taken += 1;
      const [of, bytes] = [reply, Uint8Array.from(atob(one.dataset.src.split(",")[1]), (c) => c.charCodeAt(0))];
      chain = chain.then(async () => {
        wake();
        const buffer = await context.decodeAudioData(bytes.buffer);
        if (of !== reply) return;
        pieces.push(buffer);
        if (expected.has(of)) play(buffer, of);
        else state();
      });
    }
  };
  // isRead: by a visitor who looks at the page, and does not speak
  const cut = (isRead) => {
    interrupted += playing.size > 0;
    sentAt = null;
    end([...expected], isRead);
    find("cut")?.click(); // what is still being written ends too
  };
  const kept = () => (reply in heard ? heard[reply] ?? 0 : Infinity); // seconds of the reply that the talk keeps
  const replay = () => {
    if (!context) return;
    hush();
    let left = kept();
    for (const piece of pieces) {
      if (left > 0) play(piece, null, Math.min(left, piece.duration));
      left -= piece.duration;
    }
  };

  // ------------------------------------------------------------------------------------------- microphone

  const RATE = 16000;
  const worklet = `
    registerProcessor("ears", class extends AudioWorkletProcessor {
      part = new Int16Array(1536); filled = 0; sum = 0; count = 0; phase = 0;
      process([[sound]]) {
        for (const sample of sound ?? []) { // averages down to ${RATE} Hz where the browser did not
          this.sum += sample; this.count += 1; this.phase += ${RATE};
          if (this.phase < sampleRate) continue;
          this.phase -= sampleRate;
          this.part[this.filled++] = Math.max(-1, Math.min(1, this.sum / this.count)) * 32767;
          this.sum = this.count = 0;
          if (this.filled === this.part.length) { this.port.postMessage(this.part.slice()); this.filled = 0; }
        }
        return true;
      }
    });`;
  const ears = { stream: null, context: null, parts: [], isSending: false, isHearing: false, turns: [] };

  const open = async () => {
    wake();
    const audio = { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true };
    ears.stream = await navigator.mediaDevices.getUserMedia({ audio });
    let source;
    try {
      ears.context = new AudioContext({ sampleRate: RATE });
      source = ears.context.createMediaStreamSource(ears.stream);
    } catch { // some browsers connect only what has their own rate
      ears.context = new AudioContext();
      source = ears.context.createMediaStreamSource(ears.stream);
    }
    const module = URL.createObjectURL(new Blob([worklet], { type: "text/javascript" }));
    await ears.context.audioWorklet.addModule(module);
    const node = new AudioWorkletNode(ears.context, "ears");
    node.port.onmessage = ({ data }) => {
      ears.parts.push(data);
      pump();
    };
    source.connect(node);
    find("listen")?.click();
  };
  const close = () => {
    ears.stream?.getTracks().forEach((track) => track.stop());
    ears.context?.close();
    Object.assign(ears, { stream: null, context: null, parts: [], isHearing: false });
    state();
  };
  const pump = async () => {
    if (ears.isSending || !ears.parts.length) return;
    ears.isSending = true;
    try {
      const parts = ears.parts.splice(0, 40); // under 4 s
      const answer = await fetch(address(`talk/listen?session_hash=${window.__gradio_session_hash__}`), {
        method: "POST",
        body: new Blob(parts),
      });
      const said = await answer.json();
      if (!answer.ok) throw new Error(said.detail);
      if (!ears.stream) return;
      if (said.speaking && !ears.isHearing) cut(false);
      ears.isHearing = said.speaking;
      for (const path of said.turns) {
        const meta = { _type: "gradio.FileData" };
        ears.turns.push({ path, orig_name: "spoken.wav", mime_type: "audio/wav", meta });
        find("spoken").click();
      }
      state();
    } catch (error) {
      close();
      const isGone = error instanceof TypeError; // as fetch says it
      state(`The microphone was closed. ${isGone ? "The page's server does not answer." : error.message}`);
    } finally {
      ears.isSending = false;
      if (ears.parts.length) pump();
    }
  };
  const reasons = {
    NotAllowedError: "The browser does not allow it: allow the microphone for this page, and open it again.",
    NotFoundError: "This machine has none that the browser finds: connect one, and open it again.",
    NotReadableError: "Another program holds it: close that, and open it again.",
  };
  const toggle = async () => {
    trouble = "";
    if (ears.stream) return close();
    try {
      if (!navigator.mediaDevices) throw new Error("Browsers record only from this machine, or by https.");
      await open();
      state();
    } catch (error) {
      close();
      state(`The microphone cannot be opened. ${reasons[error.name] ?? error.message}`);
    }
  };
  const checkEars = (told) => {
    if (told?.includes("refused")) close(); // nothing that is spoken could be heard
    return [];
  };

  // ------------------------------------------------------------------------------------------- buttons

  let trouble = ""; // why the microphone is closed, until it is asked for again
  const state = (told = trouble) => {
    trouble = told;
    const [mic, line] = [find("mic"), find("mic-state")];
    if (!mic) return;
    mic.textContent = ears.stream ? "Close microphone" : "Open microphone";
    mic.setAttribute("aria-pressed", String(!!ears.stream));
    const doing = ears.isHearing ? "Hearing you." : playing.size ? "Listening; speak to interrupt." : "Listening.";
    line.textContent = ears.stream ? doing : trouble;
    find("stop").disabled = !playing.size && sentAt === null;
    find("replay").disabled = !pieces.length || !kept();
  };
  const pressed = { mic: toggle, stop: () => cut(true), replay };
  document.addEventListener("click", ({ target }) => {
    pressed[target.closest("button")?.id]?.();
    if (target.closest("#new")) reset();
  });
  document.addEventListener("change", ({ target }) => target.matches("input[accept*='.zip']") && reset(), true);
  const reset = () => {
    expected.clear();
    plays.clear();
    heard = {};
    pieces = [];
    sentAt = null;
    waits.length = 0;
    find("here").textContent = "";
    hush();
  };
  new MutationObserver(() => {
    watch();
    follow();
    take();
    if (find("mic-state") && !find("mic-state").dataset.ready) {
      find("mic-state").dataset.ready = "yes";
      state();
    }
  }).observe(document, { childList: true, subtree: true, characterData: true });
  return { send, sendExample, sendSpoken, checkEars, note, waits, interruptions: () => interrupted, isPlaying: () => playing.size > 0, isListening: () => !!ears.stream, played };
})();
