import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { collate, DataError, type DataRow, fingerprint, toRows, trainTestSplit, validateRows } from './data.js';
import { BatchSampler, batches, batchesPerEpoch, epochOrder, type SamplerOptions } from './sampler.js';

const fields = [{ name: 'instruction' }, { name: 'input', optional: true }, { name: 'output', filled: true }];
const good = { instruction: 'i', input: 'x', output: 'positive' };

function errorOf(run: () => void): DataError {
  try {
    run();
  } catch (error) {
    if (error instanceof DataError) return error;
    throw error;
  }
  throw new Error('nothing was thrown');
}

const rising = (length: number): number[] => Array.from({ length }, (_, i) => i);
const sorted = (values: Iterable<number>): number[] => [...values].sort((a, b) => a - b);

describe('validateRows', () => {
  it('passes good rows, with optional fields missing or null', () => {
    const rows = toRows([good, { instruction: '', output: ' a ' }, { ...good, input: null }]);
    expect(() => validateRows(rows, fields)).not.toThrow();
  });

  it.each([
    [{ instruction: 'i' }, 'output', 'field "output" is missing; the row has instruction'],
    [{}, 'instruction', 'field "instruction" is missing; the row has no fields'],
    [{ ...good, instruction: null }, 'instruction', 'field "instruction" is null'],
    [{ ...good, output: 3 }, 'output', 'field "output" is a number (3); it must be a text'],
    [{ ...good, input: ['a'] }, 'input', 'field "input" is a list (["a"])'],
    [{ ...good, output: { a: 1 } }, 'output', 'is an object ({"a":1})'],
    [{ ...good, output: 5n }, 'output', 'is a bigint (5)'],
    [{ ...good, output: ' \n' }, 'output', 'field "output" is empty'],
    [{ ...good, instruction: 'a\ud83d' }, 'instruction', 'half of a surrogate pair'],
  ])('finds a bad field (%#)', (row, field, message) => {
    const error = errorOf(() => validateRows(toRows([good, row], 'some.jsonl'), fields));
    expect(error.problems[0]).toMatchObject({ index: 1, where: 'some.jsonl:2', field });
    expect(error.message).toContain(`some.jsonl:2: ${error.problems[0].message}`);
    expect(error.problems[0].message).toContain(message);
  });

  it('does not take inherited properties for fields', () => {
    expect(() => validateRows(toRows([{}]), [{ name: 'constructor' }])).toThrow('field "constructor" is missing');
  });

  it('names unknown labels and the one that was meant', () => {
    const options = { labels: ['negative', 'neutral', 'positive'], labelField: 'output' };
    expect(() => validateRows(toRows([good, { ...good, output: ' neutral ' }]), fields, options)).not.toThrow();
    const error = errorOf(() =>
      validateRows(
        toRows([
          { ...good, output: 'Positive' },
          { ...good, output: 'good' },
        ]),
        fields,
        options,
      ),
    );
    expect(error.message).toContain(
      'row 1: unknown label "Positive" in field "output"; the labels are negative, neutral, positive; did you mean "positive"?',
    );
    expect(error.message).toContain('row 2: unknown label "good"');
    expect(error.problems[1].message).not.toContain('did you mean');
  });

  it('shows ten problems, counts all, and keeps all', () => {
    const rows: DataRow[] = toRows(
      rising(25).map((i) => (i % 2 === 0 ? {} : good)),
      'd.jsonl',
    );
    const error = errorOf(() => validateRows(rows, fields));
    expect(error.problems).toHaveLength(26);
    expect(error.message).toContain('(13 rows)');
    expect(error.message).toContain('and 16 more');
    expect(error.message.match(/d\.jsonl:/g)).toHaveLength(10);
  });

  it('refuses an empty data set', () => {
    expect(() => validateRows([], fields)).toThrow('no rows');
  });
});

describe('trainTestSplit', () => {
  it('is disjoint, complete, of the right size, in order, and depends on the seed alone', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 2, max: 300 }),
        fc.double({ min: 0.01, max: 0.6, noNaN: true }),
        fc.nat(),
        (n, fraction, seed) => {
          fc.pre(Math.ceil(n * fraction) < n);
          const rows = rising(n).map((i) => ({ i }));
          const split = trainTestSplit(rows, fraction, seed);
          expect(split.test).toHaveLength(Math.ceil(n * fraction));
          expect(sorted([...split.trainIndices, ...split.testIndices])).toEqual(rising(n));
          expect(split.train.map((row) => row.i)).toEqual(sorted(split.trainIndices));
          expect(split.test.map((row) => row.i)).toEqual([...split.testIndices]);
          expect(trainTestSplit(rising(n), fraction, seed).testIndices).toEqual(split.testIndices);
        },
      ),
      { numRuns: 60 },
    );
  });
  it('another seed holds out other rows, and every row has a chance', () => {
    const parts = rising(60).map((seed) => trainTestSplit(rising(20), 0.25, seed).test);
    expect(new Set(parts.map(String)).size).toBeGreaterThan(50);
    expect(new Set(parts.flat()).size).toBe(20);
  });
  it('stays as it is: a run can be repeated years later', () => {
    expect(trainTestSplit(rising(12), 0.25, 42).test).toMatchInlineSnapshot(`
      [
        3,
        4,
        9,
      ]
    `);
  });
  it('refuses parts without rows', () => {
    expect(() => trainTestSplit([1], 0.5, 0)).toThrow('leaves 0 to train on');
    expect(() => trainTestSplit([], 0.5, 0)).toThrow(RangeError);
    for (const fraction of [0, 1, -1, Number.NaN])
      expect(() => trainTestSplit([1, 2], fraction, 0)).toThrow('validation_split');
  });
});

describe('epochs', () => {
  const options = fc.record({
    batchSize: fc.integer({ min: 1, max: 9 }),
    seed: fc.nat(),
    epoch: fc.nat(1000),
    shuffle: fc.boolean(),
    grouped: fc.boolean(),
  });

  it('cover each row once, and the same arguments give the same order', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 120 }), options, (n, { grouped, ...rest }) => {
        const lengths = rising(n).map((i) => (i * 37) % 11);
        const all = { ...rest, ...(grouped ? { lengths } : {}) };
        const epoch = [...batches(rising(n), all)];
        expect(epoch).toHaveLength(batchesPerEpoch(n, rest.batchSize));
        expect(sorted(epoch.flatMap((batch) => batch.rows))).toEqual(rising(n));
        for (const batch of epoch) expect(batch.items).toEqual(batch.rows);
        expect(epoch.slice(0, -1).every((batch) => batch.rows.length === rest.batchSize)).toBe(true);
        expect([...batches(rising(n), all)]).toEqual(epoch);
        const start = Math.floor(epoch.length / 2);
        expect([...batches(rising(n), { ...all, start })]).toEqual(epoch.slice(start));
        const full = [...batches(rising(n), { ...all, dropLast: true })];
        expect(full).toEqual(epoch.filter((batch) => batch.rows.length === rest.batchSize));
      }),
      { numRuns: 100 },
    );
  });

  it('differ from one another and from another seed; the batch size does not change the order', () => {
    const order = (seed: number, epoch: number): string => String(epochOrder(40, { seed, epoch }));
    expect(new Set([order(1, 0), order(1, 1), order(2, 0), order(2, 1)]).size).toBe(4);
    const flat = (batchSize: number): number[] =>
      [...batches(rising(40), { batchSize, seed: 1, epoch: 0 })].flatMap((batch) => batch.rows);
    expect(flat(3)).toEqual(flat(8));
    expect([...epochOrder(5, { seed: 1, epoch: 3, shuffle: false })]).toEqual(rising(5));
  });

  it('stay as they are: a run can be repeated years later', () => {
    expect([0, 1].map((epoch) => [...epochOrder(10, { seed: 42, epoch })])).toMatchInlineSnapshot(`
      [
        [
          0,
          2,
          1,
          5,
          6,
          7,
          8,
          9,
          4,
          3,
        ],
        [
          6,
          1,
          9,
          2,
          5,
          3,
          8,
          4,
          0,
          7,
        ],
      ]
    `);
  });

  it('rows of like length come together, the longest first', () => {
    const lengths = rising(400).map((i) => (i * 7919) % 400);
    const order = epochOrder(400, { seed: 3, epoch: 0, lengths, groupSize: 4 });
    expect(lengths[order[0]]).toBe(399);
    const waste = (rows: ArrayLike<number>): number => {
      let total = 0;
      for (let i = 0; i < 400; i += 4) {
        const batch = rising(4).map((k) => lengths[rows[i + k]]);
        total += batch.reduce((sum, length) => sum + Math.max(...batch) - length, 0);
      }
      return total;
    };
    expect(waste(order)).toBeLessThan(0.2 * waste(epochOrder(400, { seed: 3, epoch: 0 })));
    expect(() => epochOrder(3, { seed: 0, epoch: 0, lengths: [1] })).toThrow('1 lengths are given for 3 rows');
  });
});

describe('BatchSampler', () => {
  const make = (n: number, options: Partial<SamplerOptions> = {}): BatchSampler =>
    new BatchSampler(n, { batchSize: 4, seed: 7, ...options });

  it('gives the epochs of batches one after another', () => {
    const sampler = make(10);
    const expected = [0, 1, 2].flatMap((epoch) =>
      [...batches(rising(10), { batchSize: 4, seed: 7, epoch })].map(({ index, rows }) => ({
        epoch,
        index,
        rows,
        endsEpoch: index === 2,
      })),
    );
    expect(expected.map(() => sampler.next())).toEqual(expected);
  });

  it('goes on from any state, through JSON, as if it had never stopped', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 4, max: 40 }),
        fc.nat(30),
        fc.boolean(),
        fc.boolean(),
        (n, steps, dropLast, shuffle) => {
          const straight = make(n, { dropLast, shuffle });
          for (let i = 0; i < steps; i++) straight.next();
          const resumed = make(n, { dropLast, shuffle });
          resumed.next();
          resumed.restore(JSON.parse(JSON.stringify(straight.state())));
          for (let i = 0; i < 15; i++) expect(resumed.next()).toEqual(straight.next());
        },
      ),
      { numRuns: 60 },
    );
  });

  it('refuses a state of another order, naming all differences', () => {
    const state = make(10).state();
    expect(() => make(11, { seed: 8 }).restore(state)).toThrow('seed is 8 but was 7, length is 11 but was 10');
    expect(() => make(10, { lengths: rising(10) }).restore(state)).toThrow('grouped is true but was false');
    expect(() => make(10).restore({ ...state, position: 3 })).toThrow(
      'the saved position is batch 3; an epoch has 3 batches',
    );
    expect(() => make(10).restore({ ...state, epoch: -1 })).toThrow('the saved epoch is -1');
  });

  it('refuses data that gives no batch', () => {
    expect(() => make(0)).toThrow('no rows');
    expect(() => make(3, { dropLast: true })).toThrow('3 rows do not fill one batch of 4');
    expect(() => make(3, { batchSize: 0 })).toThrow('the batch size is 0');
  });
});

describe('collate', () => {
  const example = (row: number, ids: number[], from: number): { row: number; ids: Int32Array; labels: Int32Array } => ({
    row,
    ids: Int32Array.from(ids),
    labels: Int32Array.from(ids, (id, i) => (i < from ? -100 : id)),
  });

  it('pads right or left to a multiple and masks by length', () => {
    const rows = [example(5, [1, 9, 2], 1), example(8, [1, 7, 7, 9, 2], 3)];
    expect(collate(rows, { padTokenId: 2, padToMultipleOf: 4 })).toEqual({
      ids: Int32Array.from([1, 9, 2, 2, 2, 2, 2, 2, 1, 7, 7, 9, 2, 2, 2, 2]),
      labels: Int32Array.from([-100, 9, 2, ...Array<number>(5).fill(-100), -100, -100, -100, 9, 2, -100, -100, -100]),
      spans: Int32Array.from([0, 3, 0, 5]),
      B: 2,
      T: 8,
      supervised: 4,
      rows: [5, 8],
    });
    const left = collate(rows, { padTokenId: 2, padToMultipleOf: 1, paddingSide: 'left' });
    expect([...left.ids]).toEqual([2, 2, 1, 9, 2, 1, 7, 7, 9, 2]);
    expect([...left.labels]).toEqual([-100, -100, -100, 9, 2, -100, -100, -100, 9, 2]);
    expect([...left.spans]).toEqual([2, 5, 0, 5]);
    expect(left.supervised).toBe(4);
  });

  it('a multiple of 64 by default', () => {
    expect(collate([example(0, [1, 2], 1)]).T).toBe(64);
    expect(collate([example(0, rising(64), 1)]).T).toBe(64);
    expect(collate([example(0, rising(65), 1)]).T).toBe(128);
  });

  it('never trains a first token, on either side', () => {
    for (const paddingSide of ['left', 'right'] as const) {
      const batch = collate([example(0, [3, 4], 0), example(1, [5, 6, 7], 0)], { padToMultipleOf: 1, paddingSide });
      expect(batch.supervised).toBe(3);
      expect(batch.labels.filter((label) => label !== -100)).toEqual(Int32Array.from([4, 6, 7]));
    }
  });

  it('keeps every row and counts what is trained, for any rows', () => {
    const rows = fc.array(fc.array(fc.integer({ min: 0, max: 99 }), { minLength: 1, maxLength: 9 }), {
      minLength: 1,
      maxLength: 5,
    });
    fc.assert(
      fc.property(
        rows,
        fc.integer({ min: 1, max: 8 }),
        fc.constantFrom('left' as const, 'right' as const),
        (list, multiple, paddingSide) => {
          const examples = list.map((ids, i) => example(i, ids, 1 + (i % 3)));
          const batch = collate(examples, { padTokenId: 7, padToMultipleOf: multiple, paddingSide });
          expect(batch.T % multiple).toBe(0);
          expect(batch.T - Math.max(...list.map((ids) => ids.length))).toBeLessThan(multiple);
          let trained = 0;
          examples.forEach((ex, b) => {
            const [start, end] = batch.spans.subarray(2 * b, 2 * b + 2);
            expect(batch.ids.slice(b * batch.T + start, b * batch.T + end)).toEqual(ex.ids);
            expect(batch.labels.slice(b * batch.T + start, b * batch.T + end)).toEqual(ex.labels);
            trained += ex.labels.filter((label) => label !== -100).length;
          });
          expect(batch.supervised).toBe(trained);
          expect(batch.labels.filter((label) => label !== -100)).toHaveLength(trained);
        },
      ),
      { numRuns: 100 },
    );
  });

  it('refuses what makes no batch', () => {
    expect(() => collate([])).toThrow('no rows');
    expect(() => collate([example(4, [], 0)])).toThrow('row 4 has 0 ids');
    expect(() => collate([example(0, [1], 0)], { padToMultipleOf: 0 })).toThrow('pad_to_multiple_of is 0');
    expect(() => collate([example(0, [1], 0)], { padTokenId: -1 })).toThrow("padding token's id is -1");
  });
});

describe('fingerprint', () => {
  it('tells apart ids, labels, order and where rows end', () => {
    const ex = (ids: number[], labels: number[]): { ids: Int32Array; labels: Int32Array } => ({
      ids: Int32Array.from(ids),
      labels: Int32Array.from(labels),
    });
    const base = [ex([1, 2], [-100, 2]), ex([3], [-100])];
    const all = [
      base,
      [base[1], base[0]],
      [ex([1, 2], [-100, -100]), base[1]],
      [ex([1, 3], [-100, 2]), base[1]],
      [base[0]],
      [],
    ].map((list) => fingerprint(list));
    expect(new Set(all).size).toBe(all.length);
    expect(all[0]).toMatch(/^[0-9a-f]{16}$/);
    expect(fingerprint(base)).toBe(all[0]);
  });
});
