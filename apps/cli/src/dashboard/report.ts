/** `report.html`: the dashboard's page with a run inside it, which asks nothing of anybody. */
import { createHash } from 'node:crypto';
import { join } from 'node:path';
import type { LogLine, LogPlace, ReportedRun } from '../../page/types.js';
import { logFile } from '../reporting/json-lines.js';
import { reportFile } from '../reporting/overview.js';
import { writeFileAtomic } from '../write.js';
import { readPage } from './page.js';
import { readLogPart } from './run-log.js';
import { readRunView } from './run-view.js';

async function wholeLog(path: string): Promise<LogLine[]> {
  const lines: LogLine[] = [];
  let place: LogPlace = { file: '', bytes: 0 };
  for (let more = true; more; ) {
    const part = await readLogPart(path, place);
    lines.push(...part.lines);
    ({ next: place, more } = part);
  }
  return lines;
}

/** JSON that stands in a script element of HTML and in JavaScript alike. */
export function embeddedJson(value: unknown): string {
  return JSON.stringify(value).replace(
    /[<>&\u2028\u2029]/g,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, '0')}`,
  );
}

const sourceHash = (content: string): string => `'sha256-${createHash('sha256').update(content).digest('base64')}'`;

/** Puts text in the place of a part of the page, whatever characters it holds. */
function replaced(html: string, part: string, text: string): string {
  if (!html.includes(part)) throw new Error(`the page has no ${part}`);
  return html.replace(part, () => text);
}

/** The report of a run. */
async function reportOf(folder: string): Promise<string> {
  const { html, css, js } = await readPage();
  const run: ReportedRun = { view: await readRunView(folder), lines: await wholeLog(join(folder, logFile)) };
  if (/<\/script/i.test(js) || /<\/style/i.test(css)) throw new Error('the page ends its own elements');
  // Nothing but this script and this style sheet is let in, whatever the data holds.
  const policy = `default-src 'none'; script-src ${sourceHash(js)}; style-src ${sourceHash(css)}; img-src data:; base-uri 'none'; form-action 'none'`;
  const data = `<script type="application/json" id="report">${embeddedJson([run])}</script>`;
  const head = `<meta http-equiv="Content-Security-Policy" content="${policy}">`;
  const styled = replaced(html, '<link rel="stylesheet" href="page.css">', `<style>${css}</style>`);
  const scripted = replaced(styled, '<script src="page.js"></script>', `${data}\n<script>${js}</script>`);
  return replaced(scripted, '<meta charset="utf-8">', `<meta charset="utf-8">\n${head}`);
}

/**
 * Writes report.html into a run's folder.
 * @returns its path
 */
export async function writeReport(folder: string): Promise<string> {
  const path = join(folder, reportFile);
  await writeFileAtomic(path, await reportOf(folder));
  return path;
}
