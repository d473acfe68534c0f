/** Small helpers for text that is shown to people. */
import { escapeControls } from '@lorikeet/tensor';

/**
 * Text that is safe on a terminal and stays on one line: control characters and bidirectional overrides are written as
 * escapes, so that a file name or a data row cannot move the cursor or hide a part of a message.
 * @param max longest result in characters; longer text is cut in its middle
 */
export function printable(text: string, max = 200): string {
  const shortened =
    text.length > max ? `${text.slice(0, Math.ceil(max / 2) - 1)}…${text.slice(-Math.floor(max / 2))}` : text;
  return escapeControls(shortened);
}

/** A value from a config or data file as it is quoted in a message: JSON, shortened. */
export function quoted(value: unknown, max = 80): string {
  const text = JSON.stringify(value) ?? String(value);
  return printable(text, max);
}

/** `1,234,567`. */
export function formatCount(value: number): string {
  return Math.round(value).toLocaleString('en-US');
}

/** Bytes with a unit of powers of 1000, as disks and downloads are sold: `168 MB`, `4.30 GB`. */
export function formatBytes(bytes: number): string {
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let value = bytes;
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit++;
  }
  const digits = unit === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  return `${value.toFixed(digits)} ${units[unit]}`;
}

/** Seconds as `12s`, `3m05s`, `1h42m`. */
export function formatDuration(seconds: number): string {
  if (!Number.isFinite(seconds)) return '?';
  const total = Math.max(0, Math.round(seconds));
  if (total < 60) return `${total}s`;
  const minutes = Math.floor(total / 60);
  if (minutes < 60) return `${minutes}m${String(total % 60).padStart(2, '0')}s`;
  return `${Math.floor(minutes / 60)}h${String(minutes % 60).padStart(2, '0')}m`;
}

/** A number in few characters: `9.8e-5`, `0.412`, `1,204`. */
export function formatNumber(value: number, digits = 3): string {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7))
    return value.toExponential(Math.max(0, digits - 2)).replace('e+', 'e');
  if (size >= 1000) return formatCount(value);
  return Number(value.toPrecision(digits)).toString();
}

/** A text as one word of a shell command line. */
export function shellQuoted(text: string): string {
  return /^[\w@%+=:,./~-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

/** Text of a model as a terminal may have it: line breaks and tabs as they are, other control characters as escapes. */
export function terminalText(text: string): string {
  return text.replace(/[^\n\t]+/g, escapeControls);
}
