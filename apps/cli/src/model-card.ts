/** README.md of an adapter: the model card that the hub shows. */
import type { Config } from './config.js';
import { runAdapter } from './config-adapter.js';
import { formatCount, formatNumber } from './text.js';

/** What a model card tells. */
export interface CardContent {
  readonly config: Config;
  readonly baseModel: string;
  /** False for a folder: the hub knows it under no name. */
  readonly baseIsHubId: boolean;
  readonly trainable: number;
  readonly total: number;
  readonly steps: number;
  readonly totalSteps: number;
  readonly trainRows: number;
  readonly validationRows: number;
  /** Texts of tokens that the base model does not have. */
  readonly addedTokens: readonly string[];
  /** The template's name, or its text. */
  readonly template: string;
  readonly device: string;
  readonly version: string;
  readonly before?: { readonly loss: number; readonly tokenAccuracy: number } | undefined;
  readonly after?: { readonly loss: number; readonly tokenAccuracy: number } | undefined;
}

/** Text between backquotes, whatever it holds. */
function code(text: string): string {
  const plain = text.replaceAll('\n', '\\n');
  return plain.includes('`') ? `\`\` ${plain} \`\`` : `\`${plain}\``;
}

/** The card as Markdown with the front matter that the hub reads. */
export function modelCard(content: CardContent): string {
  const { config, baseModel, steps, totalSteps, before, after, addedTokens } = content;
  const { title, format, words, modulesToSave: whole, section } = runAdapter(config);
  const dropout = config.lora === undefined ? '' : `, dropout ${formatNumber(config.lora.lora_dropout)}`;
  const sets = config.train_mixture ?? [config];
  const data = sets.flatMap(({ dataset_name, train_file }) => dataset_name ?? train_file ?? []).join(', ');
  const front = [
    `library_name: ${format === 'PEFT' ? 'peft' : 'adapter-transformers'}`,
    ...(content.baseIsHubId ? [`base_model: ${JSON.stringify(baseModel)}`] : []),
    ...(config.dataset_name !== null && /^[\w.-]+\/[\w.-]+$/.test(config.dataset_name)
      ? [`datasets:\n- ${JSON.stringify(config.dataset_name)}`]
      : []),
    'pipeline_tag: text-generation',
    `tags:\n- ${section.replaceAll('_', '-')}\n- lorikeet`,
  ];
  const rows: [string, string][] = [
    ['base model', code(baseModel)],
    ['data', `${code(data)}: ${formatCount(content.trainRows)} rows, ${formatCount(content.validationRows)} held out`],
    ['prompt template', code(content.template)],
    ['trained parameters', `${formatCount(content.trainable)} of ${formatCount(content.total)}`],
    ['adapter', `${words}${dropout}`],
    ...(whole.length === 0 ? [] : [['trained whole', code(whole.join(', '))] satisfies [string, string]]),
    [
      'steps',
      steps === totalSteps ? formatCount(steps) : `${formatCount(steps)} of ${formatCount(totalSteps)} (stopped)`,
    ],
    ['rows a step', `${config.per_device_train_batch_size} x ${config.gradient_accumulation_steps}`],
    ['learning rate', `${formatNumber(config.learning_rate)}, ${config.lr_scheduler_type}`],
    ['type of weights and activations', config.dtype],
    ['seed', String(config.seed)],
    ['device', content.device],
  ];
  const lines = [
    '---',
    ...front,
    '---',
    '',
    `# ${config.run_name ?? `${title} adapter`}`,
    '',
    `A ${title} adapter in the format of ${format}, trained with lorikeet ${content.version}. \`run.yaml\` holds all settings, \`run.json\` what it ran on, \`train_log.jsonl\` the course of the training.`,
    '',
    '| | |',
    '|---|---|',
    ...rows.map(([name, value]) => `| ${name} | ${value.replaceAll('|', '\\|')} |`),
    '',
  ];
  if (after !== undefined) {
    const percent = (x: number): string => `${(100 * x).toFixed(1)} %`;
    lines.push(
      '| on the held-out rows | loss | tokens predicted right |',
      '|---|---|---|',
      ...(before === undefined
        ? []
        : [`| before | ${formatNumber(before.loss, 4)} | ${percent(before.tokenAccuracy)} |`]),
      `| after | ${formatNumber(after.loss, 4)} | ${percent(after.tokenAccuracy)} |`,
      '',
    );
  }
  if (addedTokens.length > 0) {
    lines.push(
      `The tokenizer in this folder has ${addedTokens.length} tokens that the base model lacks (${addedTokens.map(code).join(', ')}). Their rows were trained and are stored in the adapter. In Python, call \`model.resize_token_embeddings(len(tokenizer))\` before \`PeftModel.from_pretrained\`; lorikeet does so by itself.`,
      '',
    );
  }
  return lines.join('\n');
}
