const DASH = "\u2013", MINUS = "\u2212";

// ---- sorting: numbers as numbers, a missing one last; a second click reverses the order
function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const key = cell => {
    const text = cell.dataset.value ?? cell.textContent.replace(MINUS, "-").replace("<", "").trim();
    if (text === DASH || text === "") return null;
    const number = parseFloat(text.replace(/^\[/, ""));
    return Number.isNaN(number) ? text : number;
  };
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const first = head.classList.contains("word") ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? (first === "ascending" ? "descending" : "ascending") : first;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const rows = [...table.tBodies[0].rows].filter(r => !r.classList.contains("reference"))
      .map(row => ({ row, key: key(row.cells[column]) }));
    rows.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
      const numbers = typeof a.key === "number" && typeof b.key === "number";
      const difference = numbers ? a.key - b.key : String(a.key).localeCompare(String(b.key));
      return order === "descending" ? -difference : difference;
    });
    table.tBodies[0].append(...rows.map(r => r.row));
  }));
}
