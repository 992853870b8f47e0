// The API reference: search, copy buttons, and links that open the operation they lead to.
"use strict";

{
  document.documentElement.classList.add("js");

  const target = () => document.getElementById(decodeURIComponent(location.hash.slice(1)));

  // A link leads to its target even if the target is collapsed or hidden by the search.
  const showTarget = (field) => {
    if (!target()) return;
    if (target().closest("[hidden]")) {
      field.value = "";
      field.dispatchEvent(new Event("input"));
    }
    if (target() instanceof HTMLDetailsElement) target().open = true;
    target().scrollIntoView();
  };

  const addCopyButton = (sample) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "button copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(sample.querySelector("pre").textContent.trimEnd());
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 2000);
    });
    sample.querySelector(".sample-label").after(button);
  };

  const search = (field, status) => {
    const entries = [...document.querySelectorAll("[data-group] .operation, [data-group] > .panel > .rows > div")];
    const texts = new Map(entries.map((entry) => [entry, entry.textContent.toLowerCase()]));
    const apply = () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const entry of entries) entry.hidden = !words.every((word) => texts.get(entry).includes(word));
      for (const group of document.querySelectorAll("[data-group]")) {
        group.hidden = entries.every((entry) => entry.hidden || !group.contains(entry));
      }
      const matches = entries.filter((entry) => !entry.hidden).length;
      status.textContent = words.length ? (matches === 1 ? "1 match" : `${matches || "No"} matches`) : "";
    };
    field.addEventListener("input", apply);
    apply(); // the browser may have restored the field
  };

  addEventListener("DOMContentLoaded", () => {
    const field = document.getElementById("docs-search");
    if (navigator.clipboard) document.querySelectorAll(".sample").forEach(addCopyButton);
    search(field, document.getElementById("docs-matches"));
    showTarget(field);
    addEventListener("hashchange", () => showTarget(field));
  });
}
