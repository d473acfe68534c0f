import { describe, expect, it } from 'vitest';
import { chooseDataFiles } from './dataset-splits.js';

describe('chooseDataFiles', () => {
  const choose = (paths: string[], card?: string, config?: string): ReturnType<typeof chooseDataFiles> =>
    chooseDataFiles('org/set', paths, card, config);

  it('tells splits by names', () => {
    expect(choose(['sent_train.csv', 'sent_valid.csv', 'README.md'])).toMatchObject({
      train: ['sent_train.csv'],
      validation: ['sent_valid.csv'],
    });
    expect(choose(['a.jsonl', 'b.jsonl'])).toMatchObject({ train: ['a.jsonl', 'b.jsonl'], validation: [], test: [] });
    expect(choose(['latest.csv', 'contest.csv']).train).toHaveLength(2);
    expect(choose(['dev.tsv', 'train.tsv', 'eval.tsv'])).toMatchObject({
      train: ['train.tsv'],
      validation: ['dev.tsv'],
      test: ['eval.tsv'],
    });
  });

  it('does not read the same rows twice in two formats', () => {
    expect(choose(['train.csv', 'train.parquet'])).toMatchObject({ train: ['train.parquet'], format: 'parquet' });
  });

  it('obeys the card', () => {
    const card = `---
license: mit
configs:
- config_name: small
  data_files:
  - split: train
    path: small/*.jsonl
- config_name: large
  default: true
  data_files:
  - split: train
    path: [large/a-*.jsonl, large/b.jsonl]
  - split: validation
    path: "large/held/**"
---
# words`;
    const paths = ['small/1.jsonl', 'large/a-1.jsonl', 'large/b.jsonl', 'large/held/x/c.jsonl', 'large/other.jsonl'];
    expect(choose(paths, card)).toMatchObject({
      train: ['large/a-1.jsonl', 'large/b.jsonl'],
      validation: ['large/held/x/c.jsonl'],
    });
    expect(choose(paths, card, 'small').train).toEqual(['small/1.jsonl']);
    expect(() => choose(paths, card, 'huge')).toThrow(/no part "huge"; it has small, large/);
    expect(() => choose(paths, card.replace('  default: true\n', ''))).toThrow(
      /several parts: small, large.*dataset_config_name/,
    );
  });

  it('refuses sets without readable data', () => {
    expect(() => choose(['README.md', 'data.arrow', 'dataset_info.json', '.hidden/train.csv'])).toThrow(
      /no data files that are read here/,
    );
  });
});
