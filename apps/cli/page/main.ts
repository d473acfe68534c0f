/** The page: runs, curves, details. */
import { type AxisKind, latest } from './curves.js';
import { type DrawnRun, makeCharts } from './charts.js';
import { detailsOf } from './details.js';
import { byId, byteText, element, percent, shortNumber, tableRow } from './dom.js';
import { startSource } from './source.js';
import type { LogLine, RunView } from './types.js';

/** Readable on both themes. */
const colours = ['#3b82f6', '#f07818', '#12a372', '#d6409f', '#8b5cf6', '#b8860b', '#0fa3b1', '#e5484d'];

interface PageRun {
  readonly colour: string;
  view: RunView;
  lines: LogLine[];
  shown: boolean;
}

function startPage(): void {
  const runs: PageRun[] = [];
  const smoothing = byId('smoothing', HTMLInputElement);
  const axis = byId('axis', HTMLSelectElement);
  const chosen = byId('chosen', HTMLSelectElement);
  const drawCharts = makeCharts(byId('charts', HTMLElement));
  const nameOf = ({ view }: PageRun): string =>
    view.overview === null || view.overview.name === view.folder
      ? view.folder
      : `${view.overview.name} (${view.folder})`;

  const draw = (): void => {
    byId('smoothing-value', HTMLOutputElement).value = smoothing.value;
    const drawn: DrawnRun[] = runs
      .filter((run) => run.shown)
      .map((run) => ({ name: nameOf(run), colour: run.colour, lines: run.lines }));
    const kind: AxisKind = axis.value === 'time' ? 'time' : 'step';
    drawCharts(drawn, { axis: kind, smoothing: Number(smoothing.value) });
  };

  const runRow = (run: PageRun): HTMLElement => {
    const box = element('input', { type: 'checkbox' });
    box.checked = run.shown;
    box.addEventListener('change', () => {
      run.shown = box.checked;
      draw();
    });
    const swatch = element('span', { class: 'swatch' });
    swatch.style.setProperty('--run', run.colour);
    const show = (name: string, text: (value: number) => string): string => {
      const value = latest(run.lines, name);
      return value === undefined ? '–' : text(value);
    };
    const total = run.view.overview?.total_steps;
    return tableRow(
      'td',
      [
        element('label', {}, box, ' ', swatch, nameOf(run)),
        run.view.status ?? 'not finished',
        show('step', shortNumber) + (total === undefined ? '' : ` / ${shortNumber(total)}`),
        show('epoch', shortNumber),
        show('loss', shortNumber),
        show('eval_loss', shortNumber),
        show('mean_token_accuracy', percent),
        show('tokens_per_second', shortNumber),
        show('peak_memory_bytes', byteText),
        show('skipped_steps', shortNumber),
      ],
      2,
    );
  };

  const drawRuns = (): void => {
    const names = [
      'run',
      'state',
      'step',
      'epoch',
      'loss',
      'eval loss',
      'token accuracy',
      'tokens/s',
      'peak',
      'skipped',
    ];
    // What has the focus is replaced by its like.
    const table = byId('runs', HTMLTableElement);
    const focused = [...table.querySelectorAll('input')].findIndex((box) => box === document.activeElement);
    table.replaceChildren(element('thead', {}, tableRow('th', names, 2)), element('tbody', {}, ...runs.map(runRow)));
    table.querySelectorAll('input')[focused]?.focus();
  };

  const drawDetails = (): void => {
    const run = runs[chosen.selectedIndex] ?? runs[0];
    byId('details', HTMLElement).replaceChildren(...(run === undefined ? [] : detailsOf(run.view)));
  };

  for (const control of [smoothing, axis]) control.addEventListener('input', draw);
  chosen.addEventListener('input', drawDetails);

  startSource({
    view(run, view): void {
      const known = runs[run];
      if (known === undefined) runs[run] = { colour: colours[run % colours.length], view, lines: [], shown: true };
      else known.view = view;
      const selected = Math.max(0, chosen.selectedIndex);
      chosen.replaceChildren(...runs.map((one) => element('option', {}, nameOf(one))));
      chosen.selectedIndex = selected;
      byId('choice', HTMLElement).hidden = runs.length < 2;
      document.title = `${runs.map(nameOf).join(', ')} · Lorikeet`;
      drawRuns();
      if (run === selected) drawDetails();
      draw();
    },
    lines(run, lines, anew): void {
      const known = runs[run];
      if (anew) known.lines = [...lines];
      else known.lines.push(...lines);
      drawRuns();
      draw();
    },
    state(text): void {
      const state = byId('state', HTMLElement);
      if (state.textContent !== text) state.textContent = text;
    },
  });
}

startPage();
