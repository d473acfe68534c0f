/**
 * Jinja templates of strangers. They run in an interpreter that reaches nothing but the values it is given; what it does not
 * have is a limit, so here every step, every value and every text is counted, and what would become too large is refused before it
 * is made. No clock decides: a template that renders once renders always.
 */
import {
  Environment,
  Interpreter,
  type RuntimeValue as Value,
  type Statement as Node,
  parse,
  tokenize,
} from '@huggingface/jinja';
import { LorikeetError } from '@lorikeet/tensor';

/** A template that is wrong, that asks for too much, or that refuses what it is given. */
export class ChatTemplateError extends LorikeetError {
  /** The template's own words where it refused the messages by `raise_exception`. */
  readonly refusal: string | undefined;

  /**
   * @param message what is wrong
   * @param refusal the words of `raise_exception`
   * @param cause what the interpreter said
   */
  constructor(message: string, refusal?: string, cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = 'ChatTemplateError';
    this.refusal = refusal;
  }
}

/** What one rendering may take. */
export const jinjaLimits = {
  /** Characters of a template. */
  source: 200_000,
  /** White space in a row in a template: the parser's time grows with its square. */
  gap: 1000,
  /** Evaluations, with the length of what they make counted in. */
  steps: 1_000_000,
  /** Characters of any text, and of all texts in a list or map. */
  characters: 1_000_000,
  /** Items of a list or map, those of lists in it counted in. */
  items: 100_000,
  /** Numbers of one `range`. */
  range: 10_000,
  /** Expressions and blocks inside of each other. */
  depth: 300,
} as const;

/** Renders a parsed template with plain data as its variables. */
export type RenderJinja = (variables: Readonly<Record<string, unknown>>) => string;

/**
 * Parses a template, with the white space rules of chat templates (a block's line end and indentation are not text).
 * @returns renders it; throws ChatTemplateError, also where a limit of {@link jinjaLimits} is reached
 * @throws ChatTemplateError
 */
export function parseJinja(source: string): RenderJinja {
  if (source.length > jinjaLimits.source) {
    throw new ChatTemplateError(
      `a chat template of ${source.length} characters cannot be meant (at most ${jinjaLimits.source})`,
    );
  }
  if (new RegExp(`\\s{${jinjaLimits.gap}}`).test(source)) {
    throw new ChatTemplateError(`the chat template has more than ${jinjaLimits.gap} white space characters in a row`);
  }
  const program = guarded('does not parse', () => parse(tokenize(source, { lstrip_blocks: true, trim_blocks: true })));
  return (variables) =>
    guarded('fails', () => {
      const environment = new Environment();
      const budget = new Budget();
      for (const [name, value] of Object.entries({ ...globals(budget), ...variables })) environment.set(name, value);
      const { value } = new BoundedInterpreter(environment, budget).run(program);
      return typeof value === 'string' ? value : '';
    });
}

/** Runs a part of the interpreter; whatever it throws becomes an error with a name. */
function guarded<T>(what: string, run: () => T): T {
  try {
    return run();
  } catch (error) {
    if (error instanceof ChatTemplateError) throw error;
    // The engine's own stack is the last limit of what the parser recurses into.
    const said = error instanceof RangeError ? 'it is nested too deep' : error instanceof Error ? error.message : '';
    throw new ChatTemplateError(`the chat template ${what}: ${said.slice(0, 300)}`, undefined, error);
  }
}

/** What templates find beside the variables, as in transformers. */
function globals(budget: Budget): Record<string, unknown> {
  return {
    true: true,
    false: false,
    none: null,
    True: true,
    False: false,
    None: null,
    raise_exception: (message: unknown): never => {
      const said = typeof message === 'string' ? message.slice(0, 1000) : 'no reason given';
      throw new ChatTemplateError(`the chat template refuses these messages: ${said}`, said);
    },
    range: (...values: unknown[]): number[] => boundedRange(values, budget),
    strftime_now: (format: unknown): string => formatTime(new Date(), format),
  };
}

function boundedRange(values: readonly unknown[], budget: Budget): number[] {
  const numbers = values.map((value) => {
    if (typeof value === 'number' && Number.isSafeInteger(value)) return value;
    throw new ChatTemplateError('the chat template calls range() with something else than whole numbers');
  });
  const [start, stop, step = 1] = numbers.length === 1 ? [0, ...numbers] : numbers;
  if (start === undefined || stop === undefined || step === 0 || numbers.length > 3) {
    throw new ChatTemplateError(`the chat template calls range(${numbers.join(', ')})`);
  }
  const length = Math.max(0, Math.ceil((stop - start) / step));
  if (length > jinjaLimits.range) {
    throw tooMuch(`range(${numbers.join(', ')}) gives ${length} numbers, and ${jinjaLimits.range} are the limit`);
  }
  budget.spend(length);
  return Array.from({ length }, (_, i) => start + i * step);
}

const days = ['Sunday', 'Monday', 'Tuesday', 'Wednesday', 'Thursday', 'Friday', 'Saturday'];
const months = [
  'January',
  'February',
  'March',
  'April',
  'May',
  'June',
  'July',
  'August',
  'September',
  'October',
  'November',
  'December',
];

/** Python's strftime for what dates in prompts need, in English. */
function formatTime(now: Date, format: unknown): string {
  if (typeof format !== 'string' || format.length > 200) {
    throw new ChatTemplateError('the chat template calls strftime_now() without a format of at most 200 characters');
  }
  const two = (n: number): string => String(n).padStart(2, '0');
  const parts: Readonly<Record<string, string>> = {
    Y: String(now.getFullYear()),
    y: two(now.getFullYear() % 100),
    m: two(now.getMonth() + 1),
    d: two(now.getDate()),
    H: two(now.getHours()),
    I: two(now.getHours() % 12 === 0 ? 12 : now.getHours() % 12),
    M: two(now.getMinutes()),
    S: two(now.getSeconds()),
    p: now.getHours() < 12 ? 'AM' : 'PM',
    A: days[now.getDay()],
    a: days[now.getDay()].slice(0, 3),
    B: months[now.getMonth()],
    b: months[now.getMonth()].slice(0, 3),
    '%': '%',
  };
  return format.replace(/%([A-Za-z%])/g, (whole, letter: string) => parts[letter] ?? whole);
}

function tooMuch(what: string): ChatTemplateError {
  return new ChatTemplateError(`the chat template asks for too much: ${what}`);
}

/** What a rendering has left. */
class Budget {
  #steps = 0;

  spend(steps: number): void {
    this.#steps += steps;
    if (this.#steps > jinjaLimits.steps) throw tooMuch(`more than ${jinjaLimits.steps} steps`);
  }
}

/** How large a value is when it is written out. */
interface Weight {
  readonly characters: number;
  readonly items: number;
  readonly depth: number;
  /** False where something in it can change: a namespace. */
  readonly fixed: boolean;
}

/** An expression or block that is being evaluated. */
interface Frame {
  readonly node: Node;
  /** Those of its parts that have been evaluated, in order. */
  readonly values: Value[];
  /** What the method belongs to that a call is about to make. */
  receiver?: Value | undefined;
}

/** The interpreter with every part of a template counted, and with what the next operation would make foreseen. */
class BoundedInterpreter extends Interpreter {
  readonly #budget: Budget;
  readonly #weights = new WeakMap<object, Weight>();
  #frame: Frame | undefined;
  #depth = 0;

  constructor(environment: Environment, budget: Budget) {
    super(environment);
    this.#budget = budget;
  }

  /** Every part of a template comes through here, so that here all of it is counted. */
  override evaluate(node: Node | undefined, environment: Environment): Value {
    if (node === undefined) return super.evaluate(node, environment);
    this.#budget.spend(1);
    if (this.#depth >= jinjaLimits.depth) throw tooMuch(`more than ${jinjaLimits.depth} levels of nesting`);
    checkSupported(node);
    const parent = this.#frame;
    const frame: Frame = { node, values: [] };
    this.#frame = frame;
    this.#depth++;
    let value: Value;
    try {
      value = super.evaluate(node, environment);
    } finally {
      this.#frame = parent;
      this.#depth--;
    }
    this.#admit(value, node, parent?.node);
    if (parent !== undefined) {
      this.#checkMethod(value, frame, parent);
      parent.values.push(value);
      this.#foresee(parent);
    }
    return value;
  }

  /** Counts a value that was made or looked up. */
  #admit(value: Value, node: Node, parent: Node | undefined): void {
    const text = value.value;
    if (typeof text === 'string') {
      this.#checkLength(text.length);
      this.#budget.spend(text.length / (isLookup(node) ? 256 : 16));
    } else if (Array.isArray(text) || text instanceof Map) {
      const { characters, items } = this.#weigh(value);
      this.#checkLength(characters);
      const length = Array.isArray(text) ? text.length : text.size;
      // A loop makes nine values for each item before its body begins.
      if (isLoopOver(parent, node)) this.#budget.spend(4 * length);
      else this.#budget.spend(looksOnly(parent, node) ? length / 4 : characters / 16 + items);
    }
  }

  /** A method of a text may only be called where it is named: who keeps it could call it without its text being known. */
  #checkMethod(value: Value, { node, values }: Frame, parent: Frame): void {
    if (node.type !== 'MemberExpression' || value.type !== 'FunctionValue' || typeof values[0].value !== 'string')
      return;
    if (!('callee' in parent.node) || parent.node.callee !== node) {
      throw new ChatTemplateError('the chat template names a method of a text without calling it');
    }
    parent.receiver = values[0];
  }

  /** Refuses what the next operation would make too large, or look through for too long. */
  #foresee({ node, values, receiver }: Frame): void {
    if (node.type === 'BinaryExpression') {
      const [a, b] = texts(values);
      if (values.length === 2 && b !== undefined && operatorOf(node).endsWith('in')) this.#search(b, a);
    } else if (node.type === 'FilterExpression' && 'filter' in node && isCall(node.filter)) {
      const [operand, ...given] = values;
      if (operand !== undefined && given.length === node.filter.args.length) {
        this.#foreseeFilter(node.filter.callee.value, operand, given);
      }
    } else if (typeof receiver?.value === 'string' && values.at(-1)?.type === 'FunctionValue') {
      const [old, replacement] = texts(values);
      if (old !== undefined) this.#foreseeReplace(receiver.value, old, replacement ?? '');
    }
  }

  #foreseeFilter(name: string, operand: Value, given: readonly Value[]): void {
    const strings = texts(given);
    const longest = strings.reduce((most, text) => Math.max(most, text.length), 0);
    const number = given.reduce((most, { value }) => (typeof value === 'number' ? Math.max(most, value) : most), 0);
    if (name === 'replace' && typeof operand.value === 'string' && strings[0] !== undefined) {
      this.#foreseeReplace(operand.value, strings[0], strings[1] ?? '');
    } else if (name === 'join') {
      const { characters, items } = this.#weigh(operand);
      this.#checkLength(characters + Math.max(items, characters) * longest);
    } else if (name === 'indent' && typeof operand.value === 'string') {
      this.#checkLength(operand.value.length + operand.value.split('\n').length * number);
    } else if (name === 'tojson') {
      const { characters, items, depth } = this.#weigh(operand);
      this.#checkLength(characters + items * (depth * number + longest));
    }
  }

  #foreseeReplace(text: string, old: string, replacement: string): void {
    this.#search(text, old);
    const found = old === '' ? text.length + 1 : text.split(old).length - 1;
    this.#checkLength(text.length + found * replacement.length);
  }

  /** Looking for a text in a text takes their product in the worst case. */
  #search(text: string, part: string): void {
    this.#budget.spend((text.length * Math.max(1, part.length)) / 1000);
  }

  #checkLength(characters: number): void {
    if (characters > jinjaLimits.characters)
      throw tooMuch(`more than ${jinjaLimits.characters} characters in one value`);
  }

  #weigh(value: Value, level = 0): Weight {
    const content = value.value;
    if (typeof content === 'string') return { characters: content.length, items: 1, depth: 0, fixed: true };
    if (!Array.isArray(content) && !(content instanceof Map)) return { characters: 8, items: 1, depth: 0, fixed: true };
    const known = this.#weights.get(value);
    if (known !== undefined) return known;
    if (level > 100) throw tooMuch('lists more than 100 levels deep');
    let [characters, items, depth] = [2, 1, 0];
    let fixed = value.type !== 'NamespaceValue';
    const parts: Iterable<readonly [unknown, unknown]> = content.entries();
    for (const [key, part] of parts) {
      if (!isValue(part)) continue;
      const inner = this.#weigh(part, level + 1);
      if (!inner.fixed) this.#budget.spend(1);
      characters += inner.characters + (typeof key === 'string' ? key.length : 0);
      items += inner.items;
      depth = Math.max(depth, inner.depth);
      fixed &&= inner.fixed;
      if (items > jinjaLimits.items) throw tooMuch(`more than ${jinjaLimits.items} items in one value`);
    }
    const weight = { characters, items, depth: depth + 1, fixed };
    if (fixed) this.#weights.set(value, weight);
    return weight;
  }
}

const texts = (values: readonly Value[]): string[] =>
  values.flatMap(({ value }) => (typeof value === 'string' ? [value] : []));

const isLookup = (node: Node): boolean => /^(Identifier|MemberExpression|StringLiteral)$/.test(node.type);

/** Whether a value is what a loop goes through. */
function isLoopOver(parent: Node | undefined, node: Node): boolean {
  if (parent === undefined || !('iterable' in parent)) return false;
  const { iterable } = parent;
  return iterable === node || (isNode(iterable) && 'lhs' in iterable && iterable.lhs === node);
}

/** Whether the block around only looks into a value: takes a member, keeps it under a name, asks a test. */
function looksOnly(parent: Node | undefined, node: Node): boolean {
  if (parent === undefined) return false;
  if ('object' in parent) return parent.object === node;
  if (parent.type === 'If' && 'test' in parent) return parent.test === node;
  if (parent.type === 'Set' && 'value' in parent) return parent.value === node;
  if (parent.type === 'FilterExpression' && 'filter' in parent && isNode(parent.filter) && 'value' in parent.filter) {
    return /^(length|first|last|list)$/.test(String(parent.filter.value));
  }
  return parent.type === 'TestExpression';
}

const isValue = (part: unknown): part is Value =>
  typeof part === 'object' && part !== null && 'type' in part && 'value' in part;

function isNode(value: unknown): value is Node {
  return typeof value === 'object' && value !== null && 'type' in value && typeof value.type === 'string';
}

/** A call by name. */
type Call = Node & { readonly args: readonly Node[]; readonly callee: Node & { readonly value: string } };

function isCall(value: unknown): value is Call {
  if (!isNode(value) || !('args' in value) || !Array.isArray(value.args) || !('callee' in value)) return false;
  return isNode(value.callee) && 'value' in value.callee && typeof value.callee.value === 'string';
}

function operatorOf(node: Node): string {
  if (!('operator' in node) || typeof node.operator !== 'object' || node.operator === null) return '';
  return 'value' in node.operator ? String(node.operator.value) : '';
}

/** Refuses what cannot be foreseen: arguments that are unpacked into filters and methods, filters over blocks. */
function checkSupported(node: Node): void {
  if (node.type === 'FilterStatement')
    throw new ChatTemplateError('{% filter %} blocks are not supported in a chat template');
  const call = node.type === 'FilterExpression' && 'filter' in node ? node.filter : node;
  if (!isNode(call) || !('args' in call) || !Array.isArray(call.args)) return;
  const spread = call.args.some((arg) => isNode(arg) && /Spread/.test(arg.type));
  const method = 'callee' in call && isNode(call.callee) && call.callee.type === 'MemberExpression';
  if (spread && (call !== node || method)) {
    throw new ChatTemplateError('arguments that are unpacked (*) into filters and methods are not supported');
  }
}
