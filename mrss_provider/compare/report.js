"use strict";
const box = document.getElementById("filter");
const prompts = [...document.querySelectorAll("details.prompt")];
const count = document.getElementById("count");

function show() {
  const wanted = box.value.toLowerCase().trim();
  let shown = 0;
  for (const prompt of prompts) {
    prompt.hidden = !prompt.dataset.text.includes(wanted);
    shown += !prompt.hidden;
  }
  count.textContent = shown + " of " + prompts.length;
}
box.addEventListener("input", show);
document.getElementById("open").addEventListener("click", (event) => {
  const open = event.target.getAttribute("aria-pressed") !== "true";
  event.target.setAttribute("aria-pressed", open);
  event.target.textContent = open ? "Close all" : "Open all";
  for (const prompt of prompts) if (!prompt.hidden) prompt.open = open;
});
show();
