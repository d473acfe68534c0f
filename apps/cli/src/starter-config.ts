/** The run file that `lorikeet init` writes: the keys that most runs set, each with what it means and takes. */
import { stringify } from 'yaml';
import { keyMeaning } from './config-meanings.js';
import { configKeys } from './config-schema.js';

/** What the file is to say. */
export interface StarterSettings {
  readonly model: string;
  readonly fourBit: boolean;
  /** A model so small that its activations fit as they are, and that wants higher rates than a large one. */
  readonly small: boolean;
  readonly trainFile: string;
  /** Absent: the columns decide. */
  readonly promptTemplate?: string | undefined;
  /** A line above the template, such as which columns there are. */
  readonly templateNote?: string | undefined;
  /** Path or address of the JSON schema. */
  readonly schema: string;
}

/** A key with its value; without one it is shown as a comment, with its default or the example. */
type Line = readonly [key: string, value: unknown] | readonly [key: string, value: undefined, example: unknown];

/** Keys by what they are about. */
function groups(settings: StarterSettings): (readonly [heading: string, lines: readonly Line[]])[] {
  const { promptTemplate: template, small } = settings;
  return [
    [
      'Model',
      [
        ['model_name_or_path', settings.model],
        ['load_in_4bit', settings.fourBit],
        ['dtype', undefined, 'float16'],
        ['memory_limit_gb', undefined, 8],
      ],
    ],
    [
      'Data',
      [
        ['train_file', settings.trainFile],
        ['dataset_name', undefined, 'FinGPT/fingpt-sentiment-train'],
        ['validation_split', 0.1],
        template === undefined ? ['prompt_template', undefined, '{question}\n{answer}'] : ['prompt_template', template],
        ['max_length', 512],
        ['overlong', 'error'],
      ],
    ],
    [
      'Adapter',
      [
        ['lora.r', 16],
        ['lora.lora_alpha', 32],
        ['lora.lora_dropout', 0.05],
        ['lora.target_modules', 'all-linear'],
        ['lora.use_dora', undefined, true],
      ],
    ],
    [
      'Training',
      [
        ['per_device_train_batch_size', small ? 16 : 4],
        ['gradient_accumulation_steps', small ? 1 : 4],
        ['num_train_epochs', 3],
        ['max_steps', undefined, 100],
        // What LoRA usually wants: a small model ten to twenty times the rate of a large one.
        ['learning_rate', small ? 2e-3 : 1e-4],
        ['lr_scheduler_type', 'cosine'],
        ['warmup_ratio', 0.1],
        ['max_grad_norm', 1],
        // Another forward for each step, and many more dispatches: only where memory is what lacks.
        ['gradient_checkpointing', !small],
        ['seed', 42],
      ],
    ],
    [
      'Evaluations, checkpoints, log',
      [
        ['eval_strategy', 'epoch'],
        ['save_strategy', 'epoch'],
        ['save_total_limit', 2],
        ['load_best_model_at_end', undefined, true],
        ['early_stopping_patience', undefined, 2],
        ['logging_steps', 5],
        ['report_to', ['jsonl']],
        ['output_dir', 'out'],
      ],
    ],
  ];
}

/** The file's text. Paths in it are meant from the folder that it lies in. */
export function starterConfig(settings: StarterSettings): string {
  const known = new Map(configKeys().map((item) => [item.key, item]));
  const parts = [
    `# yaml-language-server: $schema=${settings.schema}
# A run of lorikeet. Keys with a # before them have their defaults; \`lorikeet config keys\` lists all that there are.
`,
  ];
  for (const [heading, lines] of groups(settings)) {
    parts.push(`\n# ${heading}\n`);
    let open = '';
    for (const [name, value, example] of lines) {
      const { takes = '', standard = '' } = known.get(name) ?? {};
      const [section, key] = name.split('.');
      const indent = key === undefined ? '' : '  ';
      if (key !== undefined && section !== open) parts.push(`${section}:\n`);
      open = section;
      if (name === 'prompt_template' && settings.templateNote !== undefined) parts.push(`# ${settings.templateNote}\n`);
      parts.push(`${indent}# ${keyMeaning(name)}: ${takes} (default: ${standard}).\n`);
      const text = stringify({ [key ?? section]: value ?? example }, { lineWidth: 0, blockQuote: false });
      parts.push(text.replace(/^(?=.)/gm, value === undefined ? `${indent}# ` : indent));
    }
  }
  return parts.join('');
}
