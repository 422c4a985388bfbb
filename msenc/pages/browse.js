// Shows the rows of #rows that fit the filter, a few at a time. All text is set as text, so nothing of it runs.
"use strict";
const { columns, rows } = JSON.parse(document.getElementById("rows").textContent);
const form = document.getElementById("filter");
const list = document.getElementById("all");
const PER_PAGE = 10;
let start = 0;

function add(parent, tag, text, className) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  if (className) element.className = className;
  return parent.appendChild(element);
}

function turn(parent, name, text, description, sound) {
  const place = add(parent, "div");
  add(place, "b", name);
  const said = add(place, "p", text || "(nothing)");
  if (description) {
    add(said, "br");
    add(said, "small", description);
  }
  if (!sound) return;
  const button = add(place, "button", "Listen");
  button.type = "button";
  button.onclick = () => {
    const audio = document.createElement("audio");
    audio.controls = audio.autoplay = true;
    audio.src = sound;
    audio.onerror = () => audio.replaceWith(`no longer there: ${sound}`);
    button.replaceWith(audio);
  };
}

function fits(row) {
  const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  const kind = form.elements.kind ? form.elements.kind.value : "";
  const text = JSON.stringify([row.title, row.before, row.reference, row.replies]).toLowerCase();
  const differs = new Set(row.replies.map(reply => JSON.stringify(reply.slice(0, 2)))).size > 1;
  return words.every(word => text.includes(word)) && (!kind || row.kinds.includes(kind))
    && (!form.elements.differs.checked || differs);
}

function show() {
  const found = rows.filter(fits);
  start = Math.max(0, Math.min(start, found.length - 1));
  start -= start % PER_PAGE;
  const shown = found.slice(start, start + PER_PAGE);
  list.replaceChildren();
  for (const row of shown) {
    const section = add(list, "section", "", "example");
    const asked = row.kinds.length ? `; planted here: ${row.kinds.join(", ")}` : "";
    add(add(section, "p"), "small", row.title + asked);
    if (row.before) turn(section, row.before[0], ...row.before.slice(1));
    const replies = add(section, "div", "", "replies");
    turn(replies, "reference", row.reference[1], row.reference[2]);
    row.replies.forEach((reply, number) => turn(replies, columns[number], ...reply));
  }
  form.elements.where.value = shown.length
    ? `${start + 1} to ${start + shown.length} of ${found.length}` : "none fits";
  form.elements.back.disabled = start === 0;
  form.elements.on.disabled = start + PER_PAGE >= found.length;
}

form.hidden = false;
form.onsubmit = event => event.preventDefault();
form.oninput = () => { start = 0; show(); };
form.elements.back.onclick = () => { start -= PER_PAGE; show(); };
form.elements.on.onclick = () => { start += PER_PAGE; show(); };
show();
