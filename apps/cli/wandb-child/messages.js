/** What the process of a run and the one that speaks to Weights & Biases tell each other. */
export {};
//# sourceMappingURL=messages.js.map