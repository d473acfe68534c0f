/** What the process of a run and the one that speaks to Weights & Biases tell each other. */
/** A line of a run's history: the numbers of one step, by the names that they have there. */
export interface HistoryLine {
  readonly step: number;
  readonly values: Readonly<Record<string, number>>;
}
/** What the server is told of a run before its first line. */
export interface RunIdentity {
  /** The same each time that the run is gone on with or sent again. */
  readonly id: string;
  readonly project: string;
  /** User or team; empty: the default one of the key's owner. */
  readonly entity: string;
  /** As people see it. */
  readonly name: string;
  readonly config: Readonly<Record<string, unknown>>;
}
/** Comes first. */
export interface StartMessage {
  readonly kind: 'start';
  /** Address of the server, without a slash at its end. */
  readonly server: string;
  readonly key: string;
  readonly run: RunIdentity;
  /** Lines from the first on that the server has: they are not sent again. */
  readonly arrived: number;
  /** How often a request is tried; without it, until this process ends. */
  readonly attempts?: number | undefined;
}
/** What a run's process says; lines come from the first on. */
export type ToChild =
  | StartMessage
  | {
      readonly kind: 'line';
      readonly line: HistoryLine;
    }
  | {
      readonly kind: 'end';
      readonly exitCode: number;
    };
/** What the other process answers. */
export type FromChild =
  /** The server knows the run. */
  | {
      readonly kind: 'open';
      readonly entity: string;
    }
  /** The server has so many lines from the first on. */
  | {
      readonly kind: 'arrived';
      readonly lines: number;
    }
  /** The server knows that the run is over. */
  | {
      readonly kind: 'finished';
    }
  /** A request failed; `final`: there will be no other. */
  | {
      readonly kind: 'trouble';
      readonly text: string;
      readonly final: boolean;
    };
//# sourceMappingURL=messages.d.ts.map
