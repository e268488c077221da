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
// What scrolls sideways must be reachable with the keyboard.
for (const box of document.querySelectorAll("article pre, article .pst-scrollable-table-container")) {
  if (box.scrollWidth <= box.clientWidth) continue;
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", box.tagName === "PRE" ? "code or output, scrolls sideways" : "table, scrolls sideways");
}
