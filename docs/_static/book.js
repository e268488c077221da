// Opened as a file, a page may not read others: the search then lists pages without excerpts.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

// A button on each block of code that copies it.
for (const block of document.querySelectorAll("article div.highlight")) {
  if (block.closest(".cell_output")) continue;
  const button = document.createElement("button");
  button.className = "copy-code";
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(block.querySelector("pre").textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  block.append(button);
}
// One button folds the code of a whole notebook, and unfolds it.
const folds = [...document.querySelectorAll(".code-fold")].slice(1); // the first is the set-up's
if (folds.length) {
  const button = document.createElement("button");
  const folded = () => folds.every((fold) => !fold.open);
  const say = () => (button.textContent = folded() ? "Show the code" : "Fold the code");
  button.className = "fold-all";
  button.type = "button";
  button.addEventListener("click", () => {
    const open = folded();
    folds.forEach((fold) => (fold.open = open));
  });
  folds.forEach((fold) => fold.addEventListener("toggle", say));
  say();
  document.querySelector("article .cell").before(button);
}
// What scrolls sideways must be reachable with the keyboard. The width of an image is known once it is there.
const SCROLLING = {
  "article pre": "code or output",
  "article .pst-scrollable-table-container": "table",
  "article .cell_output": "figure",
};
window.addEventListener("load", () => {
  for (const [kind, name] of Object.entries(SCROLLING)) {
    for (const box of document.querySelectorAll(kind)) {
      if (box.scrollWidth <= box.clientWidth) continue;
      box.tabIndex = 0;
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", `${name}, scrolls sideways`);
    }
  }
});
