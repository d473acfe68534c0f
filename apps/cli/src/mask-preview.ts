/**
 * A row as the model sees it, for `data preview` and the head of a training run: which tokens are trained, which are
 * only read, which are cut off. Colours where there are colours, brackets where there are none.
 */
import type { RowPreview, Segment } from '@lorikeet/trainer';
import { formatCount, printable } from './text.js';
import type { Ui } from './ui.js';

/** Whether a segment is the trained end of its row. */
function isTrainedEnd(segment: Segment): boolean {
  return segment.kind === 'trained' && segment.terminator;
}

/** Whether a row trains something, and trains the end that makes the model stop. */
export function trainsItsEnd(preview: RowPreview): boolean {
  return preview.counts.trained > 0 && preview.segments.some(isTrainedEnd);
}

type Style = 'special' | 'truncated' | 'masked' | 'trained' | 'end';

/** Brackets around the kinds of text where there is no colour. */
const brackets: Readonly<Record<Style, readonly [string, string]>> = {
  special: ['', ''],
  masked: ['', ''],
  truncated: ['‹', '›'],
  trained: ['⟦', '⟧'],
  end: ['⟪', '⟫'],
};

function paint(ui: Ui, style: Style, text: string): string {
  const { colors } = ui;
  if (!colors.isColorSupported) return `${brackets[style][0]}${text}${brackets[style][1]}`;
  switch (style) {
    case 'trained':
      return colors.green(text);
    case 'end':
      return colors.bold(colors.inverse(colors.green(text)));
    case 'truncated':
      return colors.strikethrough(colors.red(text));
    case 'special':
      return colors.dim(colors.cyan(text));
    case 'masked':
      return colors.dim(text);
  }
}

/** Text whose line breaks are kept and shown, and whose other control characters are written as escapes. */
function shown(text: string): string[] {
  const lines = text.split('\n').map((line) => printable(line, Number.POSITIVE_INFINITY));
  return lines.map((line, i) => (i < lines.length - 1 ? `${line}↵` : line));
}

/** One line that says what the colours or brackets of {@link renderPreview} mean. */
export function previewLegend(ui: Ui): string {
  const styles: readonly (readonly [Style, string])[] = [
    ['trained', 'trained'],
    ['end', 'trained end'],
    ['masked', 'read, not trained'],
    ['truncated', 'cut off'],
  ];
  return styles.map(([style, name]) => paint(ui, style, name)).join('  ');
}

/**
 * A row's text with every kind of token set apart, a line of counts below it, and what is wrong with the row if
 * anything is. Several lines, without a final newline.
 */
export function renderPreview(ui: Ui, preview: RowPreview): string {
  const { special, truncated, masked, trained } = preview.counts;
  const parts: string[] = [];
  for (const segment of preview.segments) {
    if (segment.text === '') continue;
    const style = isTrainedEnd(segment) ? 'end' : segment.kind;
    // A colour ends with its line: pagers and narrow terminals keep it apart then.
    const lines = shown(segment.text);
    parts.push(
      ui.colors.isColorSupported
        ? lines.map((line) => (line === '' ? '' : paint(ui, style, line))).join('\n')
        : paint(ui, style, lines.join('\n')),
    );
  }
  const out = parts.length === 0 ? [] : [parts.join('')];
  if (preview.segments.length > 0) {
    const cut = truncated > 0 ? `, ${formatCount(truncated)} cut off` : '';
    const tokens = special + masked + trained;
    out.push(
      ui.colors.dim(
        `${formatCount(tokens)} ${tokens === 1 ? 'token' : 'tokens'}: ${formatCount(trained)} trained${cut}`,
      ),
    );
  }
  if (preview.problem !== undefined) out.push(ui.colors.red(`not trained on: ${printable(preview.problem, 400)}`));
  return out.join('\n');
}
