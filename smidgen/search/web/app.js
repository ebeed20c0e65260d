// A search box over api/search. The box keeps the focus; aria-activedescendant says which answer is chosen (the combobox pattern of WAI-ARIA).

const PAUSE = 80; // ms without a key before asking
const $ = (id) => document.getElementById(id);
const box = $("query"), list = $("hits"), way = $("way");
let hits = [], chosen = -1, asked = "", asking = null, timer = 0;

async function get(address, signal) {
  const response = await fetch(address, { signal });
  const body = await response.json();
  if (!response.ok) throw new Error(body.error);
  return body;
}

async function ask() {
  const text = box.value;
  if (text === asked) return; // an answer once more would undo what the keys have chosen
  asked = text;
  asking?.abort();
  $("clear").hidden = !text;
  if (text.trim().length < 2) return show("start", text.trim() ? "Keep typing." : "");
  asking = new AbortController();
  try {
    const answer = await get("api/search?" + new URLSearchParams({ q: text }), asking.signal);
    fill(answer.hits);
    if (answer.fits) show("hits", `${hits.length} ${hits.length === 1 ? "feature" : "features"}, the best first`);
    else show("nothing", "Nothing fits.");
    list.classList.toggle("unsure", !answer.fits);
  } catch (error) {
    if (error.name === "AbortError") return;
    asked = "";
    show("", error instanceof TypeError ? "The search does not answer. Is it still running?" : error.message);
  }
}

function show(part, words) {
  for (const id of ["start", "nothing", "hits"]) $(id).hidden = id !== part;
  box.setAttribute("aria-expanded", String(part === "hits"));
  choose(part === "hits" && hits.length ? 0 : -1);
  $("status").textContent = words;
}

function fill(found) {
  hits = found;
  list.replaceChildren(...found.map((hit, i) => {
    const item = $("hit").content.firstElementChild.cloneNode(true);
    const menus = hit.path.split(" > ").filter(Boolean);
    const area = menus[1] ?? menus[0] ?? hit.title;
    item.id = `hit-${i}`;
    item.querySelector(".tile").textContent = [...area][0].toUpperCase();
    item.querySelector(".tile").style.setProperty("--hue", hue(area));
    item.querySelector(".title").textContent = hit.title;
    item.querySelector(".summary").textContent = hit.summary;
    item.querySelector(".path").textContent = menus.join(" \u203a ");
    item.addEventListener("click", () => { choose(i); open(); });
    return item;
  }));
}

function hue(name) { // the same colour for everything in one menu
  let sum = 7;
  for (const letter of name) sum = (sum * 31 + letter.codePointAt(0)) % 360;
  return sum;
}

function choose(i) {
  list.children[chosen]?.setAttribute("aria-selected", "false");
  chosen = i;
  const item = list.children[i];
  if (!item) return box.removeAttribute("aria-activedescendant");
  item.setAttribute("aria-selected", "true");
  item.scrollIntoView({ block: "nearest" });
  box.setAttribute("aria-activedescendant", item.id);
}

function open() {
  const hit = hits[chosen];
  if (!hit) return;
  $("way-title").textContent = hit.title;
  $("way-summary").textContent = hit.summary;
  $("way-steps").replaceChildren(...[...hit.path.split(" > "), hit.title].filter(Boolean).map((menu, i) => {
    const step = document.createElement("li");
    step.textContent = i ? menu : `Open ${menu}`;
    return step;
  }));
  way.showModal();
}

box.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(ask, PAUSE); });
box.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step && !list.hidden && hits.length) {
    event.preventDefault();
    choose((chosen + step + hits.length) % hits.length);
  } else if (event.key === "Escape") {
    event.preventDefault();
    clear();
  }
});
$("form").addEventListener("submit", (event) => { event.preventDefault(); if (!list.hidden) open(); });
$("clear").addEventListener("click", clear);
$("closest").addEventListener("click", () => { show("hits", "Nothing fits; these are the closest."); box.focus(); });
$("close").addEventListener("click", () => way.close());
way.addEventListener("click", (event) => { if (event.target === way) way.close(); });
way.addEventListener("close", () => box.focus());

function clear() {
  box.value = "";
  clearTimeout(timer);
  ask();
  box.focus();
}

try {
  const about = await get("api/about");
  $("footer").textContent = `${about.features.toLocaleString()} features, searched on this machine`;
  $("examples").replaceChildren(...about.examples.map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => { box.value = text; ask(); box.focus(); });
    return button;
  }));
} catch {
  $("status").textContent = "The search does not answer. Is it still running?";
}
if (box.value) ask(); // typed before this script ran
