"use strict";

// The contents stand open beside the text; where there is no room for that, and no print, they are folded away.
const contents = document.getElementById("contents");
const wide = matchMedia("(min-width: 64rem)");
const fold = () => { contents.open = wide.matches; };
wide.addEventListener("change", fold);
addEventListener("beforeprint", () => { contents.open = true; });
addEventListener("afterprint", fold);
fold();

// Search: every word of the query, anywhere in a clause or a definition. First come those whose name or id is the query,
// then those whose name begins with it, then those with every word in the title.
const query = document.getElementById("query");
const found = document.getElementById("found");
const own = (place) => [...place.children].filter((c) => !c.matches(".definitions")).map((c) => c.textContent).join(" ");
const places = [...document.querySelectorAll("[data-title]")].map((place) => {
  const text = own(place).replace(/\s+/g, " ");
  const title = place.dataset.title, low = `${title} ${text}`.toLowerCase();
  const names = [title, place.id, title.split(".").pop(), title.replace(/^[A-Z]\d+ /, "")].map((n) => n.toLowerCase());
  return { id: place.id, title, text, low, names };
});

function entry(place, words) {
  const item = document.createElement("li");
  const link = item.appendChild(document.createElement("a"));
  const start = Math.max(0, place.text.toLowerCase().indexOf(words[0]) - 30);
  link.href = "#" + place.id;
  link.appendChild(document.createElement("b")).textContent = place.title;
  link.append(" … " + place.text.slice(start, start + 90) + " …");
  return item;
}

query.addEventListener("input", () => {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = words.join(" ");
  const rank = ({ names, title }) => names.includes(text) ? 3 : names.some((name) => name.startsWith(text)) ? 2
    : words.every((word) => title.toLowerCase().includes(word)) ? 1 : 0;
  const hits = words.length ? places.filter((place) => words.every((word) => place.low.includes(word))) : [];
  hits.sort((a, b) => rank(b) - rank(a));
  found.replaceChildren(...hits.slice(0, 40).map((place) => entry(place, words)));
  if (words.length && !hits.length) found.append("nothing found");
});
found.addEventListener("click", (event) => {
  if (event.target.closest("a")) found.replaceChildren();
});
addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== query) {
    event.preventDefault();
    query.focus();
  } else if (event.key === "Escape") {
    found.replaceChildren();
    query.blur();
  } else if (event.key === "Enter" && document.activeElement === query) {
    found.querySelector("a")?.click();
  }
});
