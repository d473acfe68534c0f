/** Where random numbers come from; `Random` of `@lorikeet/nn` is one. */
export interface RandomSource {
  /** Uniform in [0, 1). */
  uniform(): number;
  /** Normal with mean 0 and variance 1. */
  normal(): number;
}
