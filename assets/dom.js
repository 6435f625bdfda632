// What the scripts of all tabs share. Put before each of them: a component's script is the body of
// one function, so these names are its own. Every text reaches the page through textContent only.
"use strict";

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function fillList(list, texts) {
  const same = texts.length === list.children.length &&
    texts.every((text, index) => list.children[index].textContent === text);
  if (!same) list.replaceChildren(...texts.map((text) => make("li", "", text)));
}

// An SVG element; attributes are set by name.
function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Hands a file to the browser's downloads.
function saveFile(name, content, type) {
  const link = make("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
