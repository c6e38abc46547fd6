// Draws the formulas, which stand as \(...\) or \[...\] on the pages.
for (const formula of document.querySelectorAll(".arithmatex"))
  katex.render(formula.textContent.slice(2, -2), formula, {
    displayMode: formula.tagName === "DIV",
    throwOnError: false,
  });
