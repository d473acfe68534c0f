import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { sharedDir } from '@lorikeet/testing';
import {
  demoHeadlines,
  expand,
  headlineCompanies,
  headlineTemplates,
  headlineTemplateVerbs,
  headlineVerbs,
  literalWords,
  TextRandom,
} from 'lorikeet/demo';
import { beforeAll, describe, expect, it } from 'vitest';
import { type Lexicon, loadLexicon } from './lexicon.js';
import { labels, type Statement, statements, tokenised } from './statements.js';
import {
  downVerbs,
  downVerbsPresent,
  negativeTemplates,
  neutralTemplates,
  positiveTemplates,
  upVerbs,
  upVerbsPresent,
} from './statement-templates.js';

let lexicon: Lexicon;
let drawn: Statement[];
beforeAll(async () => {
  lexicon = await loadLexicon();
  drawn = statements(15_000, 21, lexicon);
});

const templates = [...positiveTemplates, ...negativeTemplates, ...neutralTemplates];

/** The first amount after a word, as a number. */
function amount(text: string): number {
  return Number(text.replaceAll(',', ''));
}

describe('statements', () => {
  it('repeat by seed', () => {
    expect(statements(60, 4, lexicon)).toEqual(statements(60, 4, lexicon));
    expect(statements(60, 4, lexicon)).not.toEqual(statements(60, 5, lexicon));
  });

  it('have their labels in the ratio 4 : 6 : 5, are varied and whole', () => {
    const count = (label: string): number => drawn.filter((one) => one.label === label).length;
    expect(labels.map(count)).toEqual([4000, 6000, 5000]);
    expect(new Set(drawn.map(({ text }) => text)).size).toBeGreaterThan(0.93 * drawn.length);
    for (const { text } of drawn) {
      expect(text).not.toMatch(/[[\]{}|~]|undefined|NaN| {2}|^ | $/);
      expect(text.length).toBeGreaterThan(8);
    }
  });

  it('have well-formed templates, more than a hundred a label, none twice', () => {
    for (const template of templates) expect(expand(template, new TextRandom(1, 'any'), (name) => name)).not.toBe('');
    expect(new Set(templates).size).toBe(templates.length);
    expect(Math.min(positiveTemplates.length, negativeTemplates.length, neutralTemplates.length)).toBeGreaterThan(100);
  });

  it('put the greater number where the verb says', () => {
    const verbs = (list: readonly string[]): string => [...new Set(list)].sort((x, y) => y.length - x.length).join('|');
    const patternOf = (list: readonly string[]): RegExp =>
      new RegExp(
        `\\b(?:${verbs(list)}) (?:further )?to (?:[A-Z]{3} ?|\\$ ?)?([\\d,]+(?:\\.\\d+)?)[^.;?]*? from (?:[A-Z]{3} ?|\\$ ?)?([\\d,]+(?:\\.\\d+)?)(?! *(?:quarter|half))`,
        'gi',
      );
    let checked = 0;
    for (const { text } of drawn) {
      for (const [list, sign] of [
        [[...upVerbs, ...upVerbsPresent, 'widened'], 1],
        [[...downVerbs, ...downVerbsPresent, 'narrowed'], -1],
      ] as const) {
        for (const [found, to, from] of text.matchAll(patternOf(list))) {
          // "from 2008" and "from a year earlier" are periods.
          if (to === undefined || from === undefined || /^(?:19|20)\d\d$/.test(from)) continue;
          checked++;
          expect(Math.sign(amount(to) - amount(from)), found).toBe(sign);
        }
      }
    }
    expect(checked).toBeGreaterThan(600);
  });

  it('state the percentage that their numbers have', () => {
    let checked = 0;
    for (const { text } of drawn) {
      const match =
        /(?:by|up|down) ([\d.]+) ?(?:%|percent|per cent|pct) to (?:[A-Z]{3} ?|\$ ?)?([\d,]+(?:\.\d+)?)(?! ?\.\d)(?:(?! ?\.(?: |$)).){0,70}? (?:compared with|compared to|against|versus|from|while it was) (?:[A-Z]{3} ?|\$ ?)([\d,]+(?:\.\d+)?)(?! ?\.\d)/.exec(
          text,
        );
      const [percent, now, before] = (match ?? []).slice(1).map(amount);
      if (percent === undefined || now === undefined || before === undefined) continue;
      checked++;
      const change = (Math.abs(now - before) / before) * 100;
      // Whole percents are rounded, and small ones are raised to one.
      expect(Math.abs(change - percent), text).toBeLessThan(change < 1 ? 1 : 0.6);
    }
    expect(checked).toBeGreaterThan(15);
  });

  it('use words of figures in good news and in bad, so that a word alone does not decide', () => {
    // "loss" stands in good news (narrowed) and bad, "rose" in both too (profit, costs).
    for (const word of ['loss', 'rose', 'fell', 'decreased', 'increased', 'costs']) {
      const found = drawn.filter(({ text }) => text.toLowerCase().split(' ').includes(word)).map(({ label }) => label);
      expect(found.filter((label) => label === 'positive').length, word).toBeGreaterThan(5);
      expect(found.filter((label) => label === 'negative').length, word).toBeGreaterThan(5);
    }
  });

  it('can be written with spaces round punctuation', () => {
    const random = new TextRandom(1, 'tokenised');
    expect(tokenised('"The firm\'s sales (in euros) rose 5%, to $3.2 mn," he said.', random)).toBe(
      "`` The firm 's sales ( in euros ) rose 5 % , to $ 3.2 mn , '' he said .",
    );
  });
});

describe('the demo and the statements', () => {
  const masked = (text: string): string[] =>
    text
      .toLowerCase()
      .replace(/[\d.,]+/g, '#')
      .match(/[a-z#][a-z#'-]*/g) ?? [];

  it('share no company, no verb and no template', () => {
    const words = new Set(drawn.flatMap(({ text }) => text.toLowerCase().match(/\p{L}[\p{L}'-]*/gu) ?? []));
    for (const name of Object.values(headlineCompanies).flat()) expect(words).not.toContain(name.toLowerCase());
    const text = ` ${drawn.map((one) => masked(one.text).join(' ')).join(' . ')} `;
    const literal = ` ${templates.flatMap(literalWords).join(' ')} `;
    const verbs = [headlineVerbs.train, headlineVerbs.unseen].flatMap(({ up, down }) => [...up, ...down]);
    for (const verb of [...verbs, ...headlineTemplateVerbs.train, ...headlineTemplateVerbs.unseen]) {
      expect(text).not.toContain(` ${verb} `);
      expect(literal).not.toContain(` ${verb} `);
    }
    const demoTemplates = Object.values(headlineTemplates).flatMap((parts) => Object.values(parts).flat());
    for (const template of demoTemplates) expect(templates).not.toContain(template);
  });

  it('share no run of six words', () => {
    const runs = (text: string): string[] => {
      const list = masked(text);
      return list.slice(5).map((_, i) => list.slice(i, i + 6).join(' '));
    };
    const demo = demoHeadlines(3, { train: 900, known: 300, unseen: 300 });
    const known = new Set([...demo.train, ...demo.known, ...demo.unseen].flatMap(({ text }) => runs(text)));
    expect(known.size).toBeGreaterThan(1000);
    expect(drawn.flatMap(({ text }) => runs(text)).filter((run) => known.has(run))).toEqual([]);
  });
});

const shared = sharedDir();
describe.skipIf(shared === undefined)('statements beside the PhraseBank (skipped without the shared data)', () => {
  it('are none of its sentences, whatever the numbers', () => {
    const key = (text: string): string =>
      text
        .toLowerCase()
        .replace(/\d+/g, '#')
        .replace(/[^a-z#]+/g, ' ')
        .trim();
    const known = new Set<string>();
    for (const part of ['train', 'test']) {
      for (const line of readFileSync(join(shared ?? '', 'data', 'finsent', `fpb50_${part}.fingpt.jsonl`), 'utf8')
        .trim()
        .split('\n')) {
        const row: { input: string } = JSON.parse(line);
        known.add(key(row.input));
      }
    }
    expect(known.size).toBeGreaterThan(4000);
    // Counted, not shown: its sentences are not quoted.
    expect(drawn.filter(({ text }) => known.has(key(text))).map(({ text }) => text.length)).toEqual([]);
  });
});
