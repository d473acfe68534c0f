import { describe, expect, it } from 'vitest';
import { trainBagOfWords } from './bag-of-words.js';
import { literalWords } from './grammar.js';
import {
  demoHeadlines,
  type Headline,
  headlineCompanies,
  headlineLabels,
  headlineTemplates,
  headlineTemplateVerbs,
  headlineVerbs,
} from './headlines.js';

const sizes = { train: 900, known: 300, unseen: 300 };
const parts = demoHeadlines(11, sizes);
const all: readonly Headline[] = [...parts.train, ...parts.known, ...parts.unseen];

describe('demo headlines', () => {
  it('repeat by seed', () => {
    expect(demoHeadlines(11, sizes)).toEqual(parts);
    expect(demoHeadlines(12, sizes).train).not.toEqual(parts.train);
  });

  it('have each label equally often, use every template and come only once', () => {
    for (const part of ['train', 'known', 'unseen'] as const) {
      for (const label of headlineLabels) {
        const some = parts[part].filter((headline) => headline.label === label);
        expect(some).toHaveLength(sizes[part] / 3);
        const templates = headlineTemplates[part === 'unseen' ? 'unseen' : 'train'][label];
        expect(new Set(some.map(({ template }) => template)).size).toBe(templates.length);
      }
    }
    expect(new Set(all.map(({ text }) => text)).size).toBe(all.length);
  });

  it('keep companies, verbs and templates of the parts apart', () => {
    const names = Object.entries(headlineCompanies);
    for (const [part, companies] of names) {
      for (const [other, others] of names) {
        if (part !== other) expect(companies.filter((name) => others.includes(name))).toEqual([]);
      }
    }
    const trained = parts.train.map(({ text }) => text).join('\n');
    for (const name of [...headlineCompanies.known, ...headlineCompanies.unseen]) expect(trained).not.toContain(name);
    const seenHere = [...parts.train, ...parts.known].map(({ text }) => ` ${text.toLowerCase()} `).join('\n');
    const unseenVerbs = [...headlineVerbs.unseen.up, ...headlineVerbs.unseen.down, ...headlineTemplateVerbs.unseen];
    for (const verb of unseenVerbs) expect(seenHere).not.toContain(` ${verb} `);
    const templates = (grammar: 'train' | 'unseen'): string[] => Object.values(headlineTemplates[grammar]).flat();
    for (const template of templates('unseen')) expect(templates('train')).not.toContain(template);
  });

  it('list the verbs of their templates', () => {
    for (const grammar of ['train', 'unseen'] as const) {
      const words = new Set(Object.values(headlineTemplates[grammar]).flat().flatMap(literalWords));
      for (const verb of headlineTemplateVerbs[grammar]) expect(words).toContain(verb.split(' ')[0]);
    }
  });

  it('have numbers on the side that the label says', () => {
    let checked = 0;
    for (const { text, label } of all) {
      const match = /(\d+) \w+ \w+ (from|against) (\d+)/.exec(text);
      if (match === null) continue;
      checked++;
      const rose = Number(match[1]) > Number(match[3]);
      const ofDebt = text.includes('debt burden');
      expect(`${text}: ${rose}`).toBe(`${text}: ${(label === 'positive') !== ofDebt}`);
    }
    expect(checked).toBeGreaterThan(100);
  });

  it('are easy for counted words where the wording is known, and hard where it is not', () => {
    const model = trainBagOfWords(
      parts.train.map(({ text }) => text),
      parts.train.map(({ label }) => label),
    );
    const accuracy = (some: readonly Headline[]): number =>
      some.filter(({ text, label }) => model.predict(text) === label).length / some.length;
    expect(accuracy(parts.known)).toBeGreaterThan(0.93);
    expect(accuracy(parts.unseen)).toBeLessThan(0.75);
  });
});
