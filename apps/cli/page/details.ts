/** What a run is and did, beside its curves: facts, first rows, answers, losses of single tokens. */
import { element, percent, section, shortNumber, tableRow } from './dom.js';
import type { Prediction, PreviewRow, RunView, TokenLossRow } from './types.js';

/** Line breaks are shown and made. */
const withBreaks = (text: string): string => text.replaceAll('\n', '↵\n');

function factsTable(rows: readonly (readonly [string, string])[]): HTMLElement {
  const cells = rows.map(([name, value]) =>
    element('tr', {}, element('th', { scope: 'row' }, name), element('td', { class: 'text' }, value)),
  );
  return element('table', { class: 'facts' }, element('tbody', {}, ...cells));
}

function about({ overview, results, problems }: RunView): HTMLElement {
  const parts: Node[] = problems.map((problem) => element('p', { class: 'problem text' }, problem));
  if (overview === null) parts.push(element('p', { class: 'quiet' }, 'This run left no overview.'));
  else {
    parts.push(
      factsTable([['begun', new Date(overview.started).toLocaleString()], ...overview.facts]),
      element('details', {}, element('summary', {}, 'Settings'), element('pre', { tabindex: '0' }, overview.settings)),
    );
  }
  if (results.length > 0) {
    const rows = results.map(([name, value]) => [name, shortNumber(value)] as const);
    parts.push(element('details', {}, element('summary', {}, 'Results of the evaluation'), factsTable(rows)));
  }
  return section('Run', ...parts);
}

function previewRow(row: PreviewRow): HTMLElement {
  const text = row.segments.map(({ text: part, kind, end }) =>
    element('span', { class: end ? `${kind} end` : kind }, withBreaks(part)),
  );
  return element(
    'div',
    { class: 'row' },
    element('div', { class: 'quiet text' }, `${row.where} · ${row.tokens} tokens, ${row.trained} trained`),
    element('p', { class: 'text' }, ...text),
    ...(row.problem === null ? [] : [element('div', { class: 'problem text' }, `not trained on: ${row.problem}`)]),
  );
}

function firstRows(rows: readonly PreviewRow[]): HTMLElement {
  const legend = [
    ['trained', 'trained'],
    ['trained end', 'trained end'],
    ['masked', 'read, not trained'],
    ['special', 'put there by the tokenizer'],
    ['truncated', 'cut off'],
  ].flatMap(([kind, name]) => [element('span', { class: kind }, name), ' ']);
  return section('First rows', element('p', { class: 'controls' }, ...legend), ...rows.map(previewRow));
}

function scoredRow({ where, tokens }: TokenLossRow): HTMLElement {
  const scored = tokens.flatMap(([text, loss]) => (loss === null ? [] : [{ text, loss }]));
  const mean = scored.reduce((sum, { loss }) => sum + loss, 0) / scored.length;
  const hardest = scored
    .toSorted((a, b) => b.loss - a.loss)
    .slice(0, 5)
    .map(({ text, loss }) => `${JSON.stringify(text)} ${shortNumber(loss)}`);
  const shown = tokens.map(([text, loss]) => {
    if (loss === null) return element('span', { class: 'masked' }, withBreaks(text));
    const title = `loss ${shortNumber(loss)}, p ${percent(Math.exp(-loss))}`;
    const token = element('span', { class: 'scored', title }, withBreaks(text));
    // Full colour at p = 1 %.
    token.style.setProperty('--loss', String(Math.min(1, loss / Math.log(100))));
    return token;
  });
  return element(
    'div',
    { class: 'row' },
    element(
      'div',
      { class: 'quiet text' },
      `${where} · mean loss ${shortNumber(mean)} · hardest: ${hardest.join('  ')}`,
    ),
    element('p', { class: 'text' }, ...shown),
  );
}

function lossOfTokens(rows: readonly TokenLossRow[]): HTMLElement {
  return section(
    'Loss of tokens',
    element(
      'p',
      { class: 'quiet' },
      'Held-out rows, or those that eval was given. The redder a token, the less the model expected it.',
    ),
    ...rows.map(scoredRow),
  );
}

/** Answers that are shown at first, and more with each press. */
const answersAtOnce = 25;

const columns = ['row', 'right answer', 'read as', 'answer'] as const;

function answers({ rows, total }: RunView['predictions']): HTMLElement {
  const wrong = element('input', { type: 'checkbox' });
  const label = element(
    'select',
    {},
    element('option', { value: '' }, 'all'),
    ...[...new Set(rows.map((row) => row.label))].map((name) => element('option', { value: `=${name}` }, name)),
  );
  const search = element('input', { type: 'search' });
  const count = element('p', { role: 'status', class: 'quiet' });
  const body = element('tbody');
  const more = element('button', { type: 'button' }, 'Show more');
  let limit = answersAtOnce;
  const isRight = (row: Prediction): boolean => row.prediction === row.label;
  const show = (): void => {
    const wanted = search.value.toLowerCase();
    const found = rows.filter(
      (row) =>
        !(wrong.checked && isRight(row)) &&
        (label.value === '' || label.value === `=${row.label}`) &&
        `${row.where}\n${row.prompt}\n${row.answer}`.toLowerCase().includes(wanted),
    );
    const of = total > rows.length ? `the first ${rows.length} of ${total}` : String(total);
    count.textContent = `${found.length} of ${of} rows, ${found.filter(isRight).length} of them right`;
    body.replaceChildren(
      ...found.slice(0, limit).map((row) => {
        const kind = isRight(row) ? 'right' : 'wrong';
        const cell = (name: string, ...content: readonly (Node | string)[]): HTMLElement =>
          element('td', { 'data-name': name, class: name === columns[2] ? `text ${kind}` : 'text' }, ...content);
        return element(
          'tr',
          {},
          cell(
            columns[0],
            element('div', { class: 'prompt', title: row.prompt }, row.prompt),
            element('div', { class: 'quiet' }, row.where),
          ),
          cell(columns[1], row.label),
          cell(columns[2], row.prediction ?? 'invalid'),
          cell(columns[3], element('div', { class: 'prompt', title: row.answer }, row.answer)),
        );
      }),
    );
    more.hidden = found.length <= limit;
  };
  const filter = (): void => {
    limit = answersAtOnce;
    show();
  };
  for (const control of [wrong, label, search]) control.addEventListener('input', filter);
  more.addEventListener('click', () => {
    limit += answersAtOnce;
    show();
  });
  show();
  return section(
    'Predictions',
    element(
      'div',
      { class: 'controls' },
      element('label', {}, wrong, 'wrong only'),
      element('label', {}, 'Right answer ', label),
      element('label', {}, 'Search ', search),
    ),
    count,
    element(
      'div',
      { class: 'wide', tabindex: '0', role: 'region', 'aria-label': 'Predictions' },
      element('table', { class: 'answers' }, element('thead', {}, tableRow('th', columns)), body),
    ),
    more,
  );
}

/** The sections about one run. */
export function detailsOf(view: RunView): HTMLElement[] {
  const { overview, predictions, tokenLosses } = view;
  return [
    about(view),
    ...(overview === null || overview.rows.length === 0 ? [] : [firstRows(overview.rows)]),
    ...(predictions.rows.length === 0 ? [] : [answers(predictions)]),
    ...(tokenLosses.length === 0 ? [] : [lossOfTokens(tokenLosses)]),
  ];
}
