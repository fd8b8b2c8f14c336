// What the demo's page does by itself: remembers which reasoning was unfolded, copies, saves, shows the report, Esc, light and dark.
(() => {
  "use strict";
  const byId = (id) => document.getElementById(id);

  // A reply that still comes is drawn anew ten times a second: what the visitor folded or unfolded stays so.
  const chosen = new Map();
  document.addEventListener("click", (event) => {
    const summary = event.target.closest("summary");
    if (summary && summary.parentElement.id) chosen.set(summary.parentElement.id, !summary.parentElement.open);
    const copy = event.target.closest("button.copy");
    if (copy) copied(copy);
    if (event.target.closest("button.sign-out")) location.assign("logout");
    if (event.target.closest("button.theme")) dark(!document.body.classList.contains("dark"));
    if (event.target.closest("#new button, button#new")) chosen.clear();
  });

  async function copied(button) {
    const text = button.parentElement.querySelector(".raw").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // without https the clipboard is closed: the old way
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  function dark(on) {
    document.body.classList.toggle("dark", on);
    try { localStorage.setItem("fastoss-theme", on ? "dark" : "light"); } catch { /* private windows */ }
  }

  function saved() {
    const packed = document.querySelector("#exported pre");
    if (!packed || packed.dataset.done) return;
    packed.dataset.done = "1";
    const { name, text } = JSON.parse(packed.textContent);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function report() {
    const frame = document.querySelector(".report-frame");
    if (!frame || frame.querySelector("iframe") || !frame.offsetParent) return;
    const page = document.createElement("iframe");
    page.setAttribute("sandbox", "");
    page.title = "The run's report";
    page.src = "demo/report";
    frame.replaceChildren(page);
  }

  // The room scrolls with the answer, unless the visitor scrolled up.
  let pinned = true;
  function follow() {
    const room = byId("scroll");
    if (!room) return;
    if (!room.dataset.watched) {
      room.dataset.watched = "1";
      room.addEventListener("scroll", () => { pinned = room.scrollHeight - room.scrollTop - room.clientHeight < 60; });
    }
    if (pinned) room.scrollTop = room.scrollHeight;
  }

  const observer = new MutationObserver(() => {
    for (const [id, open] of chosen) {
      const details = byId(id);
      if (details && details.open !== open) details.open = open;
    }
    saved();
    report();
    follow();
  });

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    const stop = byId("stop");
    if (stop && stop.offsetParent) stop.click();
  });

  // Gradio adds this script when the page stands already.
  function begin() {
    observer.observe(document.body, { subtree: true, childList: true, characterData: true, attributes: true, attributeFilter: ["style", "class", "hidden"] });
    try {
      const kept = localStorage.getItem("fastoss-theme");
      if (kept) setTimeout(() => dark(kept === "dark"), 300);
    } catch { /* private windows */ }
  }
  if (document.body) begin();
  else document.addEventListener("DOMContentLoaded", begin);
})();
