import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { classificationMetrics, ConfusionCounter, matchLabel } from './metrics.js';

const labels = ['negative', 'neutral', 'positive'];

describe('ConfusionCounter', () => {
  it('has the scores of the rows so far at any time', () => {
    const counter = new ConfusionCounter(labels);
    expect(counter.accuracy).toBeNaN();
    expect(() => counter.metrics()).toThrow('no rows to score');
    const rows = [
      ['negative', 'negative'],
      ['neutral', null],
      ['positive', 'negative'],
    ] as const;
    for (const [i, [truth, answer]] of rows.entries()) {
      counter.add(truth, answer);
      const so = rows.slice(0, i + 1);
      const whole = classificationMetrics(
        so.map(([right]) => right),
        so.map(([, given]) => given),
        labels,
      );
      expect(counter.metrics()).toEqual(whole);
      expect(counter.accuracy).toBe(1 / (i + 1));
    }
    expect(() => counter.add('odd', 'neutral')).toThrow('row 4 has the right label "odd"');
  });
});

describe('classificationMetrics', () => {
  it('a table counted by hand, with invalid answers', () => {
    // Rows by right label: 4 negative (3 right, 1 neutral), 3 neutral (2 right, 1 garbage), 3 positive (1 right, 1 negative, 1 null).
    const truth = [...Array(4).fill('negative'), ...Array(3).fill('neutral'), ...Array(3).fill('positive')] as string[];
    const answers = [
      'negative negative negative neutral'.split(' '),
      ['neutral', 'neutral', 'neutral neutral'],
      ['positive', 'negative', null],
    ].flat();
    const m = classificationMetrics(truth, answers, labels);
    expect(m.confusion).toEqual([
      [3, 1, 0, 0],
      [0, 2, 0, 1],
      [1, 0, 1, 1],
    ]);
    expect(m).toMatchObject({ count: 10, correct: 6, accuracy: 0.6, invalid: 2, invalidShare: 0.2 });
    // negative: P 3/4, R 3/4, F1 3/4. neutral: P 2/3, R 2/3, F1 2/3. positive: P 1/1, R 1/3, F1 1/2.
    expect(m.classes[0]).toEqual({
      label: 'negative',
      precision: 0.75,
      recall: 0.75,
      f1: 0.75,
      support: 4,
      predicted: 4,
    });
    expect(m.classes[1].precision).toBeCloseTo(2 / 3, 15);
    expect(m.classes[1].recall).toBeCloseTo(2 / 3, 15);
    expect(m.classes[2]).toMatchObject({ precision: 1, recall: 1 / 3, f1: 0.5, support: 3, predicted: 1 });
    expect(m.macroF1).toBeCloseTo((3 / 4 + 2 / 3 + 1 / 2) / 3, 15);
    expect(m.weightedF1).toBeCloseTo((4 * (3 / 4) + 3 * (2 / 3) + 3 * (1 / 2)) / 10, 15);
  });

  it('a classifier that says garbage has no class in its favour', () => {
    const m = classificationMetrics(
      ['neutral', 'neutral', 'positive'],
      ['neutrale', 'neutral, I think', undefined],
      labels,
    );
    expect(m).toMatchObject({ correct: 0, accuracy: 0, macroF1: 0, weightedF1: 0, invalid: 3, invalidShare: 1 });
    expect(m.classes.map((c) => c.predicted)).toEqual([0, 0, 0]);
  });

  it('the majority class of 60 % gets 0.6, F1 0.75 of its class, macro a third of that', () => {
    const truth = [...Array(6).fill('neutral'), ...Array(3).fill('positive'), 'negative'] as string[];
    const m = classificationMetrics(
      truth,
      truth.map(() => 'neutral'),
      labels,
    );
    expect(m.accuracy).toBe(0.6);
    expect(m.macroF1).toBeCloseTo(0.25, 15);
    expect(m.weightedF1).toBeCloseTo(0.45, 15);
  });

  it('agrees with precision and recall counted row by row', () => {
    const answer = fc.constantFrom('a', 'b', 'c', 'zzz', null);
    fc.assert(
      fc.property(
        fc.array(fc.tuple(fc.constantFrom('a', 'b', 'c'), answer), { minLength: 1, maxLength: 40 }),
        (rows) => {
          const m = classificationMetrics(
            rows.map(([t]) => t),
            rows.map(([, a]) => a),
            ['a', 'b', 'c'],
          );
          for (const scores of m.classes) {
            const answered = rows.filter(([, a]) => a === scores.label);
            const wanted = rows.filter(([t]) => t === scores.label);
            const hits = answered.filter(([t]) => t === scores.label).length;
            const p = answered.length === 0 ? 0 : hits / answered.length;
            const r = wanted.length === 0 ? 0 : hits / wanted.length;
            expect(scores.precision).toBe(p);
            expect(scores.recall).toBe(r);
            expect(scores.f1).toBeCloseTo(p + r === 0 ? 0 : (2 * p * r) / (p + r), 12);
          }
          expect(m.correct).toBe(rows.filter(([t, a]) => t === a).length);
          expect(m.invalid).toBe(rows.filter(([, a]) => a === 'zzz' || a === null).length);
          expect(m.confusion.flat().reduce((x, y) => x + y, 0)).toBe(rows.length);
        },
      ),
      { numRuns: 100 },
    );
  });

  it('refuses what cannot be scored', () => {
    expect(() => classificationMetrics(['a'], [], ['a'])).toThrow('1 right labels but 0 answers');
    expect(() => classificationMetrics([], [], ['a'])).toThrow('no rows');
    expect(() => classificationMetrics(['a'], ['a'], ['a', 'a'])).toThrow('all different');
    expect(() => classificationMetrics(['a', 'x'], ['a', 'a'], ['a', 'b'])).toThrow('row 2 has the right label "x"');
  });
});

describe('matchLabel', () => {
  it('takes an answer that is the label and nothing else', () => {
    for (const answer of ['positive', ' positive\n', 'Positive', 'POSITIVE.', ' positive. ']) {
      expect(matchLabel(answer, labels)).toBe('positive');
    }
    for (const answer of ['', '.', 'positive or neutral', 'very positive', 'positiv', 'positive..']) {
      expect(matchLabel(answer, labels)).toBeUndefined();
    }
  });
  it('labels that differ in case only must be met exactly', () => {
    expect(matchLabel('A', ['a', 'A'])).toBe('A');
    expect(matchLabel('Up', ['UP', 'up'])).toBeUndefined();
  });
});
