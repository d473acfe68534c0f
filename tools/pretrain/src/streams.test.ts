import { TextRandom } from 'lorikeet/demo';
import { describe, expect, it } from 'vitest';
import { bosId, eosId, padId } from './bpe.js';
import { cutDocuments, fingptExample, labelledExample, packRows } from './streams.js';

/** Letters as ids above 10. */
const encode = (text: string): number[] => Array.from(text, (letter) => letter.charCodeAt(0));

describe('packRows', () => {
  const sources = [
    { name: 'long', weight: 3, documents: ['abcdefghij', 'klm', 'nopqrstuvwxyz'] },
    { name: 'short', weight: 1, documents: ['A', 'BC'] },
  ];

  it('cuts a stream of <s> document </s> into rows by weight, and repeats by seed', () => {
    const { rows, report } = packRows(sources, { tokens: 99, length: 8, seed: 1, encode });
    expect([rows.rows, rows.length, rows.ids.length]).toEqual([12, 8, 96]);
    expect(report.map(({ name, rows: count }) => [name, count])).toEqual([
      ['long', 9],
      ['short', 3],
    ]);
    expect(report[0]?.passes).toBe(3);
    expect(packRows(sources, { tokens: 99, length: 8, seed: 1, encode }).rows).toEqual(rows);
    expect(packRows(sources, { tokens: 99, length: 8, seed: 2, encode }).rows.ids).not.toEqual(rows.ids);
  });

  it('loses and adds no token: within a row every document is whole but at the ends', () => {
    const { rows } = packRows(sources, { tokens: 400, length: 16, seed: 5, encode });
    const documents = new Set(sources.flatMap((source) => source.documents));
    let whole = 0;
    for (let row = 0; row < rows.rows; row++) {
      const text = Array.from(rows.ids.subarray(row * 16, row * 16 + 16), (id) =>
        id === bosId ? '<' : id === eosId ? '>' : String.fromCharCode(id),
      ).join('');
      for (const [, document = ''] of text.matchAll(/<(\w+)>/g)) {
        whole++;
        expect(documents).toContain(document);
      }
      expect(text).not.toMatch(/<<|>>|>\w|\w</);
    }
    expect(whole).toBeGreaterThan(20);
  });

  it('keeps documents whole where only their ends are trained, and fills up with <pad>', () => {
    const whole = [
      { name: 'all', weight: 1, documents: ['xyz'] },
      { name: 'last', weight: 1, documents: ['abc1', 'defg2', 'too long to fit'], trained: 'last' as const },
    ];
    const { rows, report } = packRows(whole, { tokens: 16 * 12, length: 12, window: 2, seed: 2, encode });
    expect(report.map((source) => source.rows)).toEqual([8, 8]);
    for (let window = 0; window < 8; window++) {
      const kinds = new Set<string>();
      for (let row = 2 * window; row < 2 * window + 2; row++) {
        const ids = [...rows.ids.subarray(row * 12, row * 12 + 12)];
        const labels = [...rows.labels.subarray(row * 12, row * 12 + 12)];
        if (labels.every((label, i) => label === ids[i])) {
          kinds.add('all');
          continue;
        }
        kinds.add('last');
        const text = ids.map((id) =>
          id === bosId ? '<' : id === eosId ? '>' : id === padId ? '_' : String.fromCharCode(id),
        );
        expect(text.join('')).toMatch(/^(?:<abc1>|<defg2>)+_*$/);
        const trained = labels.filter((label) => label !== -100);
        expect(trained).toHaveLength(2 * ids.filter((id) => id === bosId).length);
        for (let i = 0; i < trained.length; i += 2) {
          expect(['1', '2']).toContain(String.fromCharCode(trained[i] ?? 0));
          expect(trained[i + 1]).toBe(eosId);
        }
      }
      expect(kinds.size).toBe(1);
    }
  });

  it('names a source without documents', () => {
    const empty = [{ name: 'empty', weight: 1, documents: [] }];
    expect(() => packRows(empty, { tokens: 64, length: 8, seed: 1, encode })).toThrow('"empty"');
    const long = [{ name: 'long', weight: 1, documents: ['abcdefgh'], trained: 'last' as const }];
    expect(() => packRows(long, { tokens: 64, length: 8, seed: 1, encode })).toThrow('"long"');
  });
});

describe('cutDocuments', () => {
  it('cuts after sentences only and keeps all text', () => {
    const text = 'One two three. Four 5.2 six! "Seven eight?" Nine.';
    expect(cutDocuments([text], 12)).toEqual(['One two three.', 'Four 5.2 six!', '"Seven eight?"', 'Nine.']);
    expect(cutDocuments([text], 1000)).toEqual([text]);
  });
});

describe('labelledExample', () => {
  const statement = { text: 'Sales rose .', label: 'positive' } as const;

  it('ends in the label, holds the statement and never leaves a placeholder', () => {
    const random = new TextRandom(1, 'examples');
    const seen = new Set<string>();
    for (let i = 0; i < 2000; i++) {
      const text = labelledExample(statement, random, 0.3);
      seen.add(text);
      expect(text).toContain('Sales rose .');
      expect(text).toMatch(/ positive$/);
      expect(text.replace('{negative/neutral/positive}', '')).not.toMatch(/\{(?:kind|options)|\$\{/);
    }
    expect(seen.size).toBeGreaterThan(500);
    expect(seen).toContain(fingptExample(statement.text, statement.label));
  });

  it('asks in the layout of the evaluation', () => {
    expect(fingptExample('X fell .', 'negative')).toBe(
      'Instruction: What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}.\nInput: X fell .\nAnswer: negative',
    );
  });
});
