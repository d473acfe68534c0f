/** The dashboard and report.html, in a browser. */
import { mkdtemp, rm, stat, symlink, writeFile } from 'node:fs/promises';
import { get, request } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { chromiumOptions, chromiumPath } from '@lorikeet/testing';
import { type Browser, chromium, type Page } from 'playwright-core';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { embeddedJson, writeReport } from '../src/dashboard/report.js';
import { readLogPart } from '../src/dashboard/run-log.js';
import { readRunView } from '../src/dashboard/run-view.js';
import { type Dashboard, serveDashboard } from '../src/dashboard/server.js';
import { build, goOn, hostile, logLines, writeRunFolder } from './run-folder.js';
import { cli } from './tiny-model.js';

const program = chromiumPath();
let folder: string;
const at = (name: string, ...more: string[]): string => join(folder, name, ...more);
let dashboard: Dashboard;

beforeAll(async () => {
  build('page');
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-dashboard-'));
  await writeRunFolder(at('first'), 'first');
  await writeRunFolder(at('second'), `second ${hostile}`, 3);
  dashboard = await serveDashboard([at('first'), at('second')]);
});
afterAll(async () => {
  await dashboard.close();
  await rm(folder, { recursive: true, force: true });
});

/** A request as no browser would make it: path and Host as they are given. */
async function ask(
  path: string,
  more: { host?: string; method?: string } = {},
): Promise<{ status: number; body: string }> {
  const { hostname, port, host } = new URL(dashboard.url);
  return new Promise((resolve, reject) => {
    const asked = request(
      { hostname, port, path, method: more.method ?? 'GET', headers: { host: more.host ?? host } },
      (response) => {
        let body = '';
        response.setEncoding('utf8');
        response.on('data', (text: string) => void (body += text));
        response.on('end', () => resolve({ status: response.statusCode ?? 0, body }));
      },
    );
    asked.on('error', reject);
    asked.end();
  });
}

describe('the server', () => {
  it('listens on the loopback address and lets no script in but its own', async () => {
    expect(dashboard.url).toMatch(/^http:\/\/127\.0\.0\.1:\d+\/$/);
    const policy = await new Promise<string>((resolve, reject) => {
      get(dashboard.url, (response) => {
        response.resume();
        resolve(String(response.headers['content-security-policy']));
      }).on('error', reject);
    });
    expect(policy).toContain("default-src 'none'; script-src 'self';");
    expect(policy).not.toContain('unsafe');
  });

  it.each(['evil.example', 'evil.example:80', '127.0.0.1', '127.0.0.1.evil.example:1'])(
    'refuses the host name %j, to which a page elsewhere could be made to lead here',
    async (host) => {
      expect((await ask('/', { host })).status).toBe(403);
      expect((await ask('/api/runs/0', { host })).status).toBe(403);
    },
  );

  it('answers localhost', async () => {
    const { port } = new URL(dashboard.url);
    expect((await ask('/', { host: `localhost:${port}` })).status).toBe(200);
  });

  it.each(['POST', 'PUT', 'DELETE', 'HEAD', 'OPTIONS'])('refuses %s', async (method) => {
    expect((await ask('/', { method })).status).toBe(405);
  });

  it.each([
    '/../../../../etc/passwd',
    '/%2e%2e/%2e%2e/etc/passwd',
    '/page.js/../../package.json',
    '/api/runs/../../etc/passwd',
    '/api/runs/2',
    '/api/runs/-1',
    '/api/runs/0/log/../run.yaml',
    '/api/runs/0/train_log.jsonl',
    '//etc/passwd',
    '/first/run.yaml',
    '/constructor',
  ])('has nothing at %s', async (path) => {
    expect(await ask(path)).toEqual({ status: 404, body: 'there is nothing here\n' });
  });

  it('follows no link out of a run', async () => {
    await writeRunFolder(at('linked'), 'linked');
    await rm(at('linked', 'predictions.jsonl'));
    await writeFile(at('secret.jsonl'), '{"file":"f","line":1,"label":"secret","prediction":null,"answer":"secret"}\n');
    await symlink(at('secret.jsonl'), at('linked', 'predictions.jsonl'));
    const view = await readRunView(at('linked'));
    expect(view.predictions).toEqual({ total: 0, rows: [] });
    expect(view.problems).toHaveLength(1);
    expect(view.problems[0]).toContain('predictions.jsonl is not shown');
  });

  it('names files of another shape, and shows the rest', async () => {
    await writeRunFolder(at('odd'), 'odd');
    await writeFile(at('odd', 'overview.json'), '{"name": 3}');
    await writeFile(at('odd', 'token_losses.json'), '{');
    const view = await readRunView(at('odd'));
    expect(view.overview).toBeNull();
    expect(view.predictions.total).toBe(130);
    expect(view.problems.map((problem) => problem.split(':')[0])).toEqual([
      'overview.json is not shown',
      'token_losses.json is not shown',
    ]);
  });
});

describe('a log that grows', () => {
  it('is read on from where it ended; an unfinished line waits, a new file is read anew', async () => {
    const path = at('growing.jsonl');
    const none = await readLogPart(path, { file: '', bytes: 0 });
    expect(none).toEqual({ lines: [], next: { file: '', bytes: 0 }, anew: false, more: false });
    await writeFile(path, '{"step":1}\n{"step":2,"loss":null}\nno line\n{"ste');
    const first = await readLogPart(path, none.next);
    expect(first).toMatchObject({ lines: [{ step: 1 }, { step: 2, loss: null }], anew: true, more: false });
    expect((await readLogPart(path, first.next)).lines).toEqual([]);
    await writeFile(path, 'p":3}\n{"step":"4"}\n{"step":5}\n', { flag: 'a' });
    const second = await readLogPart(path, first.next);
    expect(second).toMatchObject({ lines: [{ step: 3 }, { step: 5 }], anew: false });
    // Another file of the same length or more, as a run that goes on from a checkpoint makes it.
    await writeFile(at('other.jsonl'), '{"step":7}\n'.repeat(20));
    const other = await readLogPart(at('other.jsonl'), second.next);
    expect(other).toMatchObject({ anew: true, more: false });
    expect(other.lines).toHaveLength(20);
  });

  it('comes in parts', async () => {
    const path = at('long.jsonl');
    await writeFile(path, '{"step":123456789}\n'.repeat(100_000));
    let place = { file: '', bytes: 0 };
    const counts: number[] = [];
    for (let more = true; more; ) {
      const part = await readLogPart(path, place);
      counts.push(part.lines.length);
      ({ next: place, more } = part);
    }
    expect(counts).toHaveLength(2);
    expect(counts.reduce((a, b) => a + b)).toBe(100_000);
  });
});

describe('the commands', () => {
  it('dashboard --json prints its address, and Ctrl-C ends it', async () => {
    const listeners = new Set<() => void>();
    let answered: Promise<number> | undefined;
    const run = await cli(['dashboard', at('first'), '--json'], {
      signals: {
        on: (_event: string, listener: () => void) => listeners.add(listener),
        off: (_event: string, listener: () => void) => listeners.delete(listener),
        exit: () => undefined,
      },
      onOut: (text) => {
        const { url } = JSON.parse(text);
        answered = fetch(url).then(async (response) => {
          await response.text();
          for (const listener of listeners) listener();
          return response.status;
        });
      },
    });
    expect(await answered).toBe(200);
    expect(run.code).toBe(0);
    expect(run.out).toMatch(/^\{"url":"http:\/\/127\.0\.0\.1:\d+\/"\}\n$/);
  });

  it('a folder without a run and a port that is taken are named', async () => {
    const none = await cli(['dashboard', folder]);
    expect(none.code).toBe(1);
    expect(none.err).toContain('this folder holds no run');
    const { port } = new URL(dashboard.url);
    const taken = await cli(['dashboard', at('first'), '--port', port]);
    expect(taken.code).toBe(1);
    expect(taken.err).toContain(`port ${port} is taken`);
  });

  it('report writes the file anew', async () => {
    await writeRunFolder(at('reported'), 'reported');
    const run = await cli(['report', at('reported'), '--json']);
    expect(run.code).toBe(0);
    expect(JSON.parse(run.out)).toEqual({ report: at('reported', 'report.html') });
    expect((await stat(at('reported', 'report.html'))).size).toBeGreaterThan(50_000);
  });
});

it('JSON inside the page ends no element and no line of a script', () => {
  const text = embeddedJson([hostile, '<!--', ']]>', '&amp;']);
  expect(text).not.toMatch(/[<>&\u2028\u2029]/);
  expect(JSON.parse(text)).toEqual([hostile, '<!--', ']]>', '&amp;']);
});

const why = program === undefined ? ' (skipped: no Chromium)' : '';
describe.skipIf(program === undefined)(`in a browser${why}`, () => {
  let browser: Browser;
  beforeAll(async () => {
    const { executablePath, args } = chromiumOptions(program ?? '');
    // Nothing here is drawn by a GPU, and its software stand-in takes seconds a page.
    browser = await chromium.launch({ executablePath, args: [...args, '--disable-gpu'] });
  });
  afterAll(() => browser?.close());

  /** A page, what it asks for, and what goes wrong on it. */
  async function open(url: string): Promise<{ page: Page; asked: string[]; wrong: string[] }> {
    const page = await browser.newPage({ viewport: { width: 1400, height: 900 } });
    const asked: string[] = [];
    const wrong: string[] = [];
    page.on('request', (one) => void asked.push(one.url()));
    page.on('pageerror', (error) => void wrong.push(error.message));
    page.on('console', (message) => {
      if (message.type() === 'error') wrong.push(message.text());
    });
    await page.goto(url);
    return { page, asked, wrong };
  }

  const legend = (page: Page, title: string): Promise<string[]> =>
    page
      .locator('figure', { has: page.getByRole('heading', { name: title }) })
      .locator('.legend li')
      .allInnerTexts();
  /** Different colours of a chart's canvas: a drawn one has more than its background. */
  const inks = (page: Page, index: number): Promise<number> =>
    page.evaluate(`(() => {
      const canvas = document.querySelectorAll('canvas')[${index}];
      const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
      return new Set(new Uint32Array(data.buffer)).size;
    })()`);

  /** Waits until everything is on the page: the runs come one by one. */
  async function complete(page: Page, runs: number): Promise<void> {
    await page.getByText('Predictions').first().waitFor();
    await expect.poll(() => legend(page, 'Loss'), { timeout: 30_000 }).toHaveLength(2 * runs);
  }

  async function expectWhole(page: Page, runs: number): Promise<void> {
    await complete(page, runs);
    expect(await page.locator('canvas').count()).toBe(6);
    for (let i = 0; i < 6; i++) expect(await inks(page, i)).toBeGreaterThan(10);
    // What comes from data is text: no element was made of it, and no script ran.
    expect(await page.locator('img').count()).toBe(0);
    expect(await page.title()).not.toBe('broken');
    expect(await page.locator('main').innerText()).toContain('<img src=x onerror=');
  }

  it('the dashboard draws its runs over each other, asks its own origin alone, and keeps hostile texts texts', async () => {
    const { page, asked, wrong } = await open(dashboard.url);
    await expectWhole(page, 2);
    expect(asked.filter((url) => !url.startsWith(dashboard.url))).toEqual([]);
    expect(wrong).toEqual([]);
    expect(await legend(page, 'Loss')).toEqual(expect.arrayContaining([expect.stringMatching(/^first train 0\.\d+$/)]));
    expect(await legend(page, 'Peak memory')).toEqual(expect.arrayContaining([expect.stringMatching(/6\.1 GB$/)]));
    const row = await page.locator('#runs tbody tr').first().innerText();
    expect(row.split(/\t/).map((cell) => cell.trim())).toEqual(
      expect.arrayContaining(['first', 'not finished', '60 / 200', '1.2', '6.1 GB', '1']),
    );
    // One run alone.
    await page.locator('#runs input').nth(1).uncheck();
    expect(await legend(page, 'Loss')).toHaveLength(2);
    await page.close();
  });

  it('new lines of a log arrive while it is open', async () => {
    await writeRunFolder(at('live'), 'live');
    const own = await serveDashboard([at('live')]);
    const { page, wrong } = await open(own.url);
    const steps = page.locator('#runs tbody td').nth(2);
    await steps.filter({ hasText: '60 / 200' }).waitFor();
    await goOn(at('live'), 61, 75);
    await steps.filter({ hasText: '75 / 200' }).waitFor();
    // The run goes on from an earlier checkpoint: its log is another file.
    await rm(at('live', 'train_log.jsonl'));
    await writeFile(at('live', 'train_log.jsonl'), logLines(1, 50));
    await steps.filter({ hasText: '50 / 200' }).waitFor();
    await writeFile(at('live', 'run.json'), '{"status":"done"}');
    await page.getByRole('cell', { name: 'done' }).waitFor();
    expect(wrong).toEqual([]);
    await own.close();
    await page.getByText('trying again').waitFor();
    await page.close();
  });

  it('smoothing, axis and filters do what they say', async () => {
    const { page, wrong } = await open(dashboard.url);
    await complete(page, 2);
    const sharp = await legend(page, 'Gradient norm');
    await page.locator('#smoothing').fill('0.9');
    expect(await legend(page, 'Gradient norm')).not.toEqual(sharp);
    await page.locator('#axis').selectOption('time');
    expect(await page.locator('canvas').first().getAttribute('aria-label')).toMatch(/^Loss by time: first train 0\./);
    const answers = page.locator('.answers tbody tr');
    const count = page.getByText(/ of them right$/);
    expect(await count.innerText()).toBe('130 of 130 rows, 104 of them right');
    expect(await answers.count()).toBe(25);
    await page.getByRole('button', { name: 'Show more' }).click();
    expect(await answers.count()).toBe(50);
    await page.getByLabel('wrong only').check();
    expect(await count.innerText()).toBe('26 of 130 rows, 0 of them right');
    await page.getByLabel('wrong only').uncheck();
    await page.getByLabel('Right answer').selectOption('negative');
    expect(await count.innerText()).toBe('43 of 130 rows, 35 of them right');
    await page.getByLabel('Search').fill('ZEBRA');
    expect(await answers.count()).toBe(1);
    expect(await answers.first().innerText()).toContain('headline 7 zebra');
    // The other run's rows.
    await page.locator('#chosen').selectOption({ index: 1 });
    expect(await count.innerText()).toBe('130 of 130 rows, 104 of them right');
    expect(await page.locator('.scored').first().getAttribute('title')).toBe('loss 3.2, p 4.1 %');
    expect(wrong).toEqual([]);
    await page.close();
  });

  it('report.html holds the same and asks for nothing', async () => {
    await writeRunFolder(at('whole'), 'whole');
    const url = pathToFileURL(await writeReport(at('whole'))).href;
    const { page, asked, wrong } = await open(url);
    await expectWhole(page, 1);
    expect(asked.filter((one) => !one.startsWith('data:'))).toEqual([url]);
    expect(wrong).toEqual([]);
    // There is no choice between runs.
    expect(await page.locator('#choice').isVisible()).toBe(false);
    expect(await legend(page, 'Token accuracy')).toEqual(['train 90.5 %', 'eval 91.9 %']);
    await page.close();
  });

  it('nothing is wider than the window', async () => {
    const { page } = await open(dashboard.url);
    await complete(page, 2);
    for (const width of [400, 1400]) {
      await page.setViewportSize({ width, height: 900 });
      await expect.poll(() => page.evaluate('innerWidth')).toBe(width);
      expect(await page.evaluate('document.documentElement.scrollWidth')).toBeLessThanOrEqual(width);
      // The charts are drawn anew for their place, a frame later.
      const drawn = (): Promise<number> => page.evaluate("document.querySelector('canvas').clientWidth");
      await expect.poll(drawn).toBeLessThan(width);
      if (width > 1000) expect(await drawn()).toBeGreaterThan(300);
    }
    await page.close();
  });
});
