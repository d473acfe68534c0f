/** Elements and numbers as they are shown. Text from data reaches the page through {@link element} alone, as text. */

/** An element with attributes and children; texts become text nodes, never markup. */
export function element<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Readonly<Record<string, string>> = {},
  ...children: readonly (Node | string)[]
): HTMLElementTagNameMap[K] {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** The element of index.html with an id. */
export function byId<T extends HTMLElement>(id: string, type: new () => T): T {
  const found = document.getElementById(id);
  if (!(found instanceof type)) throw new Error(`the page has no ${type.name} with the id ${id}`);
  return found;
}

/** A row of a table. */
export function tableRow(
  kind: 'td' | 'th',
  cells: readonly (Node | string)[],
  numbersFrom: number = Infinity,
): HTMLElement {
  return element(
    'tr',
    {},
    ...cells.map((cell, i) => element(kind, { class: i >= numbersFrom ? 'number' : 'name' }, cell)),
  );
}

/** A section with a title. */
export function section(title: string, ...children: readonly (Node | string)[]): HTMLElement {
  const id = `section-${title.toLowerCase().replaceAll(/\W+/g, '-')}`;
  return element('section', { 'aria-labelledby': id }, element('h2', { id }, title), ...children);
}

/** A number in few characters. */
export function shortNumber(value: number): string {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7))
    return Number(value.toPrecision(3)).toExponential().replace('e+', 'e');
  return size >= 1000 ? Math.round(value).toLocaleString('en-US') : Number(value.toPrecision(4)).toString();
}

/** A share as per cent. */
export function percent(value: number): string {
  return `${(100 * value).toFixed(1)} %`;
}

/** Bytes with a unit of powers of 1000. */
export function byteText(value: number): string {
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  const unit = value < 1 ? 0 : Math.min(units.length - 1, Math.floor(Math.log10(value) / 3));
  return `${Number((value / 1000 ** unit).toPrecision(3))} ${units[unit]}`;
}

/** Seconds as `45s`, `3m`, `1h05m`. */
export function durationText(seconds: number): string {
  if (seconds < 60) return `${Number(seconds.toPrecision(3))}s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes >= 60) return `${Math.floor(minutes / 60)}h${String(minutes % 60).padStart(2, '0')}m`;
  const rest = Math.round(seconds % 60);
  return rest === 0 ? `${minutes}m` : `${minutes}m${String(rest).padStart(2, '0')}s`;
}
