/** The part of @huggingface/jinja that is used; its own declarations import without extensions, which Node's rules do not find. */
declare module '@huggingface/jinja' {
  /** Part of a parsed template; its other keys depend on its type. */
  export interface Statement {
    readonly type: string;
  }

  /** A value of the interpreter. Lists hold values, and so do maps. */
  export interface RuntimeValue {
    readonly type: string;
    readonly value: unknown;
  }

  export class Environment {
    set(name: string, value: unknown): RuntimeValue;
  }

  export class Interpreter {
    constructor(environment: Environment);
    run(program: Statement): RuntimeValue;
    evaluate(statement: Statement | undefined, environment: Environment): RuntimeValue;
  }

  export interface Token {
    readonly type: string;
    readonly value: string;
  }

  export function tokenize(source: string, options: { trim_blocks?: boolean; lstrip_blocks?: boolean }): Token[];
  export function parse(tokens: Token[]): Statement;
}
