"""What is wrong with a page in a real browser: overflow, low contrast, missing alternative texts, console errors."""

from pathlib import Path

import pytest

from tests.browser import CHROMIUM, DRIVER, Browser

WIDTHS = (400, 1280)
SCRIPT = """
const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
const background = element => {
  for (let e = element; e; e = e.parentElement) {
    const color = parse(getComputedStyle(e).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
    if (color[3] > 0) return null;  // partly transparent: not judged
  }
  return matchMedia('(prefers-color-scheme: dark)').matches ? [0, 0, 0] : [255, 255, 255];
};
const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const luminance = color => {
  const [r, g, b] = color.slice(0, 3).map(c => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ratio = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
const name = e => e.tagName + '.' + e.className + ' "' + (e.textContent || '').trim().slice(0, 40) + '"';
const problems = [];
const shown = e => e.checkVisibility({visibilityProperty: true, opacityProperty: true}) && e.getClientRects().length;
const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
if (document.documentElement.scrollWidth > innerWidth)
  problems.push('the page is ' + document.documentElement.scrollWidth + ' px wide');
for (const e of document.querySelectorAll('body *')) {
  if (!shown(e) || e.closest('.skip, .skip-to-content')) continue;
  let holder = e.parentElement;
  while (holder && !scrolls(holder)) holder = holder.parentElement;
  const right = e.getBoundingClientRect().right, left = e.getBoundingClientRect().left;
  if (!holder && left < innerWidth && right > innerWidth + 1) problems.push('beyond the right edge: ' + name(e));
  if (innerWidth < 600 && scrolls(e) && e.tagName !== 'PRE' && !e.closest('pre, aside, .folded')
      && e.scrollWidth > e.clientWidth + 1 && SCROLLING) problems.push('cut, one must scroll: ' + name(e));
  const texts = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  const behind = texts ? background(e) : null;
  if (behind) {
    const style = getComputedStyle(e), large = parseFloat(style.fontSize) >= 24;
    const value = ratio(parse(style.color), behind);
    if (value < (large ? 3 : 4.5)) problems.push('contrast ' + value.toFixed(2) + ': ' + name(e));
  }
}
for (const e of document.querySelectorAll('.axis span, .scale span'))
  if (parseFloat(getComputedStyle(e).fontSize) < 13) problems.push('small text of an axis: ' + name(e));
const wraps = e => getComputedStyle(e).overflowWrap !== 'normal' || getComputedStyle(e).wordBreak !== 'normal';
for (const e of document.querySelectorAll('th, dt, h1, h2, h3, label, nav a'))
  if (shown(e) && !e.closest('.skip, thead') && wraps(e)) for (const node of e.childNodes) {
    if (node.nodeType !== 3) continue;
    for (const word of node.textContent.matchAll(/[\\w.%+-]{2,24}/g)) {
      const range = document.createRange();
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
      if (lines.size > 1 && !word[0].includes('-')) problems.push('broken word: ' + word[0] + ' in ' + name(e));
    }
  }
for (const e of document.images) if (!e.alt.trim()) problems.push('no alternative text: ' + e.src.slice(0, 60));
for (const e of document.images)
  if (!(e.complete && e.naturalWidth)) problems.push('not loaded: ' + e.src.slice(0, 60));
for (const e of document.querySelectorAll('svg[role=img]'))
  if (!e.getAttribute('aria-label')) problems.push('a chart without a label');
const heads = [...document.querySelectorAll('h1, h2')].map(e => e.textContent.trim());
for (const head of new Set(heads)) if (heads.filter(h => h === head).length > 1) problems.push('twice: ' + head);
if (document.querySelectorAll('h1').length !== 1) problems.push('not exactly one h1');
return problems;
"""


def need_browser() -> None:
    """Skip the test where no browser is installed."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)")


def audit(chromium: Browser, page: Path, width: int, dark: bool, scrolling: bool = False) -> list[str]:
    """Problems of a page at a width in CSS pixels; scrolling: whether tables may scroll at a narrow width."""
    chromium.show(page, width, 900, dark)
    problems = chromium.run(SCRIPT.replace("SCROLLING", "false" if scrolling else "true"))
    return [*problems, *(f"console: {line}" for line in chromium.console())]
