// Plays a study's trials in an order of the listener's own, keeps the answers in this browser, and gives them as CSV.
// All text is set as text, so nothing of it runs.
"use strict";
const study = JSON.parse(document.getElementById("study").textContent);
const at = id => document.getElementById(id);
const COLUMNS = ["page", "listener", "place", "item", "question", "first", "second", "answer", "seconds", "check"];
const KEPT = `msenc-listen-${study.page}`;
const isPair = study.kind === "ab";
const questions = new Map(study.questions); // name -> text
let state = null; // {listener, done: [{answers: {question: answer}, seconds}]}, one entry per trial that is over
let order = [];
let begun = 0;

// FNV-1a, 32 bits: the same listener always gets the same order, and a row that was changed is noticed.
function hash(text) {
  let value = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) value = Math.imul(value ^ byte, 0x01000193) >>> 0;
  return value;
}

// Mulberry32: numbers from 0 to below 1.
function generator(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), seed | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

function shuffled(list, random) {
  const mixed = [...list];
  for (let i = mixed.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [mixed[i], mixed[j]] = [mixed[j], mixed[i]];
  }
  return mixed;
}

// A listener's trials, each with its sounds from left to right. The trials of a block are turned together.
function orderOf(listener) {
  const random = generator(hash(`${study.page}/${study.seed}/${listener}`));
  const trials = shuffled(study.trials, random);
  const turned = new Map(study.trials.map(trial => [trial.block, false]));
  for (const block of turned.keys()) turned.set(block, random() < 0.5);
  return trials.map(trial => ({
    ...trial,
    sounds: turned.get(trial.block) ? [...trial.sounds].reverse() : trial.sounds,
  }));
}

// ------------------------------------------------------------------------------------------------ what is kept

function keep() {
  try {
    localStorage.setItem(`${KEPT}/${state.listener}`, JSON.stringify(state));
    localStorage.setItem(KEPT, state.listener);
  } catch {
    at("trouble").textContent = "This browser does not keep your progress: please finish without closing the page.";
  }
}

function kept(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

function isComplete(entry) {
  return entry !== null && typeof entry === "object" && Number.isFinite(entry.seconds)
    && [...questions.keys()].every(question => study.answers.includes(entry.answers?.[question]));
}

function keptOf(listener) {
  try {
    const found = JSON.parse(kept(`${KEPT}/${listener}`));
    if (found.listener === listener && found.done.length <= study.trials.length && found.done.every(isComplete)) {
      return found;
    }
  } catch {
    // nothing, or not what this page wrote
  }
  return { listener, done: [] };
}

// ------------------------------------------------------------------------------------------------ what is shown

function add(parent, tag, text, className) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  if (className) element.className = className;
  return parent.appendChild(element);
}

function player(parent, tag, source, label) {
  const media = add(parent, tag);
  media.controls = true;
  media.preload = "auto";
  media.src = source;
  media.setAttribute("aria-label", label);
  media.onerror = () => {
    at("trouble").textContent = `${source} cannot be played. Is the whole folder of this page there?`;
  };
  return media;
}

function showContext(trial) {
  const place = at("context");
  place.replaceChildren();
  if (!trial.turns.length) add(place, "p", "The reply opens the conversation.");
  trial.turns.forEach(([speaker, text, description], n) => {
    const said = add(place, "p");
    if (speaker) add(said, "b", `${speaker}: `);
    said.append(text);
    if (description) add(said, "small", ` (${description})`);
    if (n < trial.turns.length - 1 || !(trial.clip.video || trial.clip.audio)) return;
    if (trial.clip.picture) add(place, "img").src = trial.clip.picture;
    for (const image of place.querySelectorAll("img")) image.alt = "A picture of this turn";
    player(place, trial.clip.video ? "video" : "audio", trial.clip.video || trial.clip.audio, "The last turn")
      .playsInline = true;
  });
}

function showReplies(trial) {
  const place = at("replies");
  place.replaceChildren();
  trial.sounds.forEach((sound, n) => {
    const name = isPair ? `Reply ${"AB"[n]}` : "Reply";
    const box = add(place, "div");
    add(box, "h2", trial.speaker ? `${name} (${trial.speaker})` : name);
    const media = player(box, "audio", `sounds/${sound}.wav`, name);
    const note = add(box, "small", "not heard yet");
    media.onended = () => { media.dataset.heard = "yes"; note.textContent = "heard"; };
  });
}

function showQuestions() {
  const place = at("questions");
  place.replaceChildren();
  for (const [name, text] of questions) {
    const box = add(place, "fieldset");
    add(box, "legend", text);
    const choices = add(box, "div", "", "choices");
    for (const answer of study.answers) {
      const label = add(choices, "label");
      const radio = add(label, "input");
      Object.assign(radio, { type: "radio", name, value: answer });
      label.append(` ${answer === "same" ? "no difference" : answer}`);
    }
    if (!isPair) {
      const ends = add(box, "div", "", "ends");
      add(ends, "small", "1: not at all");
      add(ends, "small", "5: very");
    }
  }
}

function show() {
  const place = state ? state.done.length : 0;
  at("begin").hidden = state !== null;
  at("trial").hidden = !state || place === order.length;
  at("end").hidden = !state || place < order.length;
  at("lacking").textContent = "";
  if (!state) return;
  if (place === order.length) {
    at("trial").reset();
    offer();
  } else {
    at("bar").value = place;
    at("trial").querySelector("h1").textContent = `${place + 1} of ${order.length}`;
    showContext(order[place]);
    showReplies(order[place]);
    showQuestions();
    begun = performance.now();
  }
  scrollTo(0, 0);
  (place === order.length ? at("end") : at("trial")).querySelector("h1").focus();
}

// ------------------------------------------------------------------------------------------------ the answers

function csv() {
  const rows = [COLUMNS];
  state.done.forEach((entry, n) => {
    const trial = order[n];
    for (const question of questions.keys()) {
      const row = [study.page, state.listener, n + 1, trial.id, question, trial.sounds[0], trial.sounds[1] ?? "",
        entry.answers[question], entry.seconds.toFixed(1)];
      rows.push([...row, hash(row.join(",")).toString(16).padStart(8, "0")]);
    }
  });
  return rows.map(row => row.join(",") + "\n").join("");
}

function offer() {
  const link = at("download");
  if (link.href) URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  link.download = `listening-${study.page}-${state.listener}.csv`;
}

function begin(listener) {
  order = orderOf(listener);
  state = keptOf(listener);
  keep();
  show();
}

function freshCode() {
  return Array.from(crypto.getRandomValues(new Uint8Array(5)), byte => byte.toString(16).padStart(2, "0")).join("");
}

at("begin").onsubmit = event => {
  event.preventDefault();
  begin(at("listener").value);
};

at("trial").onsubmit = event => {
  event.preventDefault();
  const unheard = at("replies").querySelectorAll("audio:not([data-heard])").length;
  const given = Object.fromEntries(new FormData(at("trial")));
  const open = [...questions.keys()].filter(question => !given[question]).length;
  const lacking = [];
  if (unheard) lacking.push(isPair ? "Listen to both replies to their end." : "Listen to the reply to its end.");
  if (open) lacking.push("Answer every question.");
  at("lacking").textContent = lacking.join(" ");
  if (lacking.length) return;
  state.done.push({ answers: given, seconds: (performance.now() - begun) / 1000 });
  keep();
  show();
};

at("again").onclick = () => {
  state = null;
  try {
    localStorage.removeItem(KEPT);
  } catch {
    // nothing was kept
  }
  at("begin").reset();
  at("listener").value = freshCode();
  show();
};

// One sound at a time.
document.addEventListener("play", event => {
  for (const media of document.querySelectorAll("audio, video")) if (media !== event.target) media.pause();
}, true);

const given = new URLSearchParams(location.search).get("listener");
const isCode = /^[A-Za-z0-9_-]{1,40}$/.test(given ?? "");
const current = kept(KEPT);
at("listener").value = isCode ? given : freshCode();
if (current !== null && (!isCode || given === current)) begin(current);
else show();
