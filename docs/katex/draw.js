// Draws the formulas of notebooks; elsewhere a dollar is a dollar.
for (const cell of document.querySelectorAll(".jp-MarkdownCell"))
  renderMathInElement(cell, {
    delimiters: [
      { left: "$$", right: "$$", display: true },
      { left: "$", right: "$", display: false },
    ],
    throwOnError: false,
  });
