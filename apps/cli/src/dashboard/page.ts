/** The page's files, which the server gives out one by one and a report holds. */
import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { fileError } from '../errors.js';

/** The page's modules, each behind those that it imports. */
const modules = ['dom', 'curves', 'charts', 'details', 'source', 'main'];

const inPackage = (path: string): string => fileURLToPath(new URL(`../../${path}`, import.meta.url));

async function text(path: string): Promise<string> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    throw fileError(error, path, 'a part of this program cannot be read');
  }
}

/**
 * The page's script: uPlot, and the modules put together in one function. They are this package's own, compiled by tsc,
 * which writes an import or export on one line.
 */
async function script(uplot: string): Promise<string> {
  const parts = await Promise.all(modules.map((name) => text(inPackage(`dist/page/${name}.js`))));
  const lines = parts.join('\n').split('\n');
  const code = lines
    .filter((line) => !/^import .* from '\.\/[\w-]+\.js';$/.test(line) && !line.startsWith('//# '))
    .map((line) => line.replace(/^export (?=(async )?(function|const|class) )/, ''));
  const left = code.find((line) => /^(import|export)\b/.test(line));
  if (left !== undefined) throw new Error(`the page's modules cannot be put together: ${left}`);
  return `${uplot}\n(() => {\n'use strict';\n${code.join('\n')}\n})();\n`;
}

/** The page. */
export interface Page {
  /** Names page.css and page.js as files beside it. */
  readonly html: string;
  readonly css: string;
  readonly js: string;
}

/** Reads the page from the package. */
export async function readPage(): Promise<Page> {
  const uplot = join(dirname(createRequire(import.meta.url).resolve('uplot/package.json')), 'dist');
  const [html, chartCss, css, chartJs] = await Promise.all([
    text(inPackage('page/index.html')),
    text(join(uplot, 'uPlot.min.css')),
    text(inPackage('page/page.css')),
    text(join(uplot, 'uPlot.iife.min.js')),
  ]);
  return { html, css: `${chartCss}\n${css}`, js: await script(chartJs) };
}
