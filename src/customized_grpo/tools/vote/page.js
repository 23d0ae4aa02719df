"use strict";

const POLL_MS = 2000;
const CRISP_BELOW = 256; // px: smaller pictures are enlarged with hard edges
const GAP = 8;
const SMALLEST = 110; // px: the page scrolls before pictures are smaller
const $ = (id) => document.getElementById(id);
let group = null; // that is shown
let best = null; // its digest, where the worst is still to be chosen
let isSending = false;

function picture(digest, alt) {
  const image = new Image();
  image.alt = alt;
  image.addEventListener("load", () => {
    image.classList.toggle("crisp", image.naturalWidth < CRISP_BELOW);
  });
  image.src = `/pictures/${digest}.png`;
  return image;
}

function say(text, isWrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", isWrong);
}

// The number of columns with which the pictures are largest on this screen.
function fit() {
  if (!group) return;
  const count = group.pictures.length;
  const width = document.querySelector("main").clientWidth;
  const height = window.innerHeight - $("pictures").offsetTop - $("keys").offsetHeight - 12;
  const side = (whole, parts) => (whole - GAP * (parts - 1)) / parts;
  const sides = group.pictures.map((_, i) =>
    Math.min(side(width, i + 1), side(height, Math.ceil(count / (i + 1)))));
  const columns = sides.indexOf(Math.max(...sides)) + 1;
  const largest = Math.max(sides[columns - 1], Math.min(SMALLEST, side(width, columns)));
  $("pictures").style.setProperty("--columns", columns);
  $("pictures").style.setProperty("--side", `${Math.floor(largest)}px`);
}

function ask() {
  $("question").textContent = best === null ? group.question : "And which one is the worst?";
  for (const button of $("pictures").children) {
    button.setAttribute("aria-pressed", button.dataset.digest === best);
  }
}

function show(next) {
  group = next;
  best = null;
  $("task").hidden = !group;
  if (!group) return;
  $("prompt").textContent = group.prompt;
  $("references").replaceChildren(...group.references.map((d) => picture(d, "reference")));
  const buttons = group.pictures.map((digest, i) => {
    const button = document.createElement("button");
    const key = document.createElement("kbd");
    key.textContent = i + 1;
    button.dataset.digest = digest;
    button.append(picture(digest, `picture ${i + 1}`), key);
    button.addEventListener("click", () => choose(digest));
    return button;
  });
  $("pictures").replaceChildren(...buttons);
  ask();
  fit();
}

function choose(digest) {
  if (isSending) return;
  if (!group.needs_worst) return vote(digest, null);
  if (best === null || best === digest) {
    best = best === null ? digest : null;
    return ask();
  }
  return vote(best, digest);
}

function voter() {
  return $("voter").value.trim() || "me";
}

async function vote(best, worst) {
  isSending = true;
  const body = JSON.stringify({ group: group.id, best, worst, voter: voter() });
  const headers = { "content-type": "application/json" };
  try {
    const answer = await fetch("/votes", { method: "POST", headers, body });
    if (!answer.ok && answer.status !== 409) throw new Error((await answer.json()).detail);
    await look();
  } catch (error) {
    say(`The vote was not taken: ${error.message}`, true);
  } finally {
    isSending = false;
  }
}

// Goes on to the next group unless the one that is shown still waits.
async function look() {
  const answer = await fetch(`/groups?voter=${encodeURIComponent(voter())}`);
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.detail);
  document.title = `${found.title} - vote`;
  $("title").textContent = found.title;
  $("progress").textContent = found.num_asked
    ? `${found.num_answered} of ${found.num_asked} groups have their votes` : "";
  say(found.groups.length ? "" : "Nothing to vote on now. This page looks again by itself.");
  if (!found.groups.some((g) => g.id === group?.id)) show(found.groups[0] ?? null);
  for (const digest of found.groups[1]?.pictures ?? []) new Image().src = `/pictures/${digest}.png`;
}

async function refresh() {
  try {
    if (!isSending) await look();
  } catch (error) {
    say(`cgrpo vote does not answer: ${error.message}`, true);
  }
}

async function poll() {
  await refresh();
  setTimeout(poll, POLL_MS);
}

$("voter").value = localStorage.getItem("voter") ?? "";
$("voter").placeholder = "me";
$("voter").addEventListener("change", () => {
  localStorage.setItem("voter", voter());
  show(null);
  refresh();
});
$("alike").addEventListener("click", () => isSending || vote(null, null));
document.addEventListener("keydown", (event) => {
  if (!group || isSending || event.target === $("voter") || event.ctrlKey || event.metaKey) return;
  if (event.key === "0") vote(null, null);
  const digest = group.pictures[Number(event.key) - 1];
  if (digest !== undefined) choose(digest);
});
window.addEventListener("resize", fit);
poll();
