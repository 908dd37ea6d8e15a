"use strict";

// The keys n and p go to the next and the previous section.
const sections = [...document.querySelectorAll("main > section[id]")];

document.addEventListener("keydown", (event) => {
  const step = { n: 1, p: -1 }[event.key];
  if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
  const here = sections.findLastIndex((section) => section.getBoundingClientRect().top < 8);
  const next = sections[Math.min(Math.max(here + step, 0), sections.length - 1)];
  next.scrollIntoView();
  next.focus({ preventScroll: true });
});
