// The ratio kernels under every schedule, and without each of their synchronizations, against the CPU implementation.
#include "mixer_cases.h"

using namespace mixer_cases;
using cuda::Form;
using cuda::Pass;

int main(int argc, char** argv) {
  // channels, height, width, patch, tokens, width, depth, hidden
  const MixerSizes small{1, 8, 24, 2, 48, 64, 2, 64}, odd{3, 6, 10, 2, 15, 40, 2, 50},
      tall{2, 26, 10, 2, 65, 64, 1, 32};
  const MixerSizes wide{1, 4, 32, 2, 32, 128, 2, 64}, widest{4, 4, 8, 2, 8, 256, 1, 48};
  std::vector<simt::Case> cases{
      mixer("log_ratio", {small, 4, 1, 1, Pass::forward, Objective::none, false}),
      mixer("score_difference", {small, 3, 2, 1, Pass::image, Objective::score, true}),
      mixer("ratio_loss", {small, 3, 1, 2, Pass::weights, Objective::logistic, true, Form::several, 3}),
      mixer("ratio_loss, one launch", {small, 3, 1, 2, Pass::weights, Objective::logistic, true, Form::one_launch, 3}),
  };
  // Three steps of tokens per unit: an odd number, so that the next tile's first copies overlap the last step's reads.
  cases.push_back(
      mixer("ratio_loss, 65 tokens", {tall, 2, 1, 1, Pass::weights, Objective::logistic, true, Form::several, 3}));
  const MixerSizes paired{1, 12, 20, 2, 60, 64, 2, 32}, largest{1, 16, 36, 2, 144, 200, 2, 24};
  cases.push_back(mixer("score_difference, two parts",
                        {paired, 3, 2, 1, Pass::image, Objective::score, true, Form::several, 1, Type::float32, 0, 2}));
  cases.push_back(mixer("ratio_loss, two parts", {paired, 2, 1, 2, Pass::weights, Objective::logistic, true,
                                                  Form::several, 3, Type::float32, 0, 2}));
  const auto with_energy = [](MixerSizes s) {
    s.energy = true;
    return s;
  };
  const MixerSizes energetic = with_energy({1, 8, 24, 2, 48, 64, 1, 32});
  cases.push_back(mixer("score_difference, energy", {energetic, 3, 2, 1, Pass::image, Objective::score, true}));
  cases.push_back(
      mixer("ratio_loss, energy", {energetic, 3, 1, 2, Pass::weights, Objective::logistic, true, Form::several, 3}));
  const std::string command = argc > 1 ? argv[1] : "";
  if (command != "mutate") {
    cases.push_back(mixer("log_ratio, odd", {odd, 7, 1, 3, Pass::forward, Objective::none, true}));
    cases.push_back(mixer("log_ratio, bf16",
                          {odd, 2, 1, 3, Pass::forward, Objective::none, false, Form::several, 1, Type::bfloat16}));
    for (int divergence = 0; divergence < divergences; ++divergence) {
      cases.push_back(
          mixer("score_difference, odd, " + std::to_string(divergence),
                {odd, 3, 3, 2, Pass::image, Objective::score, true, Form::several, 1, Type::float32, divergence}));
    }
    cases.push_back(
        mixer("log_ratio_backward", {odd, 5, 1, 2, Pass::weights, Objective::given, false, Form::several, 2}));
    cases.push_back(mixer("ratio_loss, bf16", {odd, 2, 1, 3, Pass::weights, Objective::logistic, true, Form::one_launch,
                                               100, Type::bfloat16}));
    cases.push_back(mixer("score_difference, 128", {wide, 3, 1, 1, Pass::image, Objective::score, true}));
    cases.push_back(
        mixer("ratio_loss, 128", {wide, 2, 1, 1, Pass::weights, Objective::logistic, true, Form::one_launch, 3}));
    cases.push_back(mixer("log_ratio, two parts", {paired, 3, 1, 2, Pass::forward, Objective::none, true, Form::several,
                                                   1, Type::float32, 0, 2}));
    cases.push_back(
        mixer("score_difference, 256 wide, two parts", {largest, 2, 1, 1, Pass::image, Objective::score, true}));
    cases.push_back(
        mixer("log_ratio_backward, 256 wide, two parts", {largest, 1, 1, 1, Pass::weights, Objective::given, false}));
    const MixerSizes odd_energy = with_energy(odd), paired_energy = with_energy(paired);
    cases.push_back(mixer("log_ratio, odd, energy", {odd_energy, 5, 1, 3, Pass::forward, Objective::none, true}));
    cases.push_back(
        mixer("log_ratio_backward, odd, energy, bf16",
              {odd_energy, 3, 1, 2, Pass::weights, Objective::given, false, Form::several, 2, Type::bfloat16}));
    cases.push_back(mixer("ratio_loss, energy, one launch",
                          {energetic, 2, 1, 2, Pass::weights, Objective::logistic, true, Form::one_launch, 3}));
    cases.push_back(mixer("score_difference, energy, two parts", {paired_energy, 2, 2, 1, Pass::image, Objective::score,
                                                                  true, Form::several, 1, Type::float32, 0, 2}));
    cases.push_back(
        mixer("log_ratio_backward, energy, two parts",
              {paired_energy, 2, 1, 1, Pass::weights, Objective::given, true, Form::several, 3, Type::float32, 0, 2}));
    cases.push_back(
        mixer("ratio_loss, 256", {widest, 2, 1, 2, Pass::weights, Objective::logistic, true, Form::automatic, 3}));
  }
  if (command == "once") {  // each in one mode, for the sanitizers
    for (const simt::Case& c : cases) {
      const std::string found = c.run(simt::modes[0]);
      if (!found.empty()) return std::printf("%s: %s\n", c.name.c_str(), found.c_str()), 1;
    }
    std::printf("%zu cases\n", cases.size());
    return 0;
  }
  return simt::main_of(argc, argv, cases);
}
