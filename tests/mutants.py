"""Lines of the program, changed as a careless edit would change them, and the tests that must notice.

python -m tests.mutants [--only PATTERN] [--list]

The tracked files are copied to a temporary folder; there each mutant is applied alone, and its tests are run by a
process of their own. A mutant that lives is a gap in the tests.
"""

import argparse
import gc
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
TIMEOUT = 300.0  # seconds that the tests of one mutant may take
PASSED, FAILED = 0, 1  # exit codes of pytest
PRELOADED = [
    "accelerate",
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage",
    "diffusers.models.transformers.transformer_qwenimage",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit",
    "peft",
    "pytest",
    "transformers.models.dinov3_vit.modeling_dinov3_vit",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.siglip.modeling_siglip",
]
"""What our modules import, and none of ours: seconds that are paid once for all mutants, where there is fork."""


class DoesNotApply(ValueError):
    """The text that a mutant replaces is not in its file, or more than once."""


@dataclass(frozen=True)
class Mutant:
    name: str
    """What is wrong then, as a sentence."""
    file: str
    old: str
    """It must occur exactly once in the file: the smallest piece that does."""
    new: str
    tests: tuple[str, ...]
    """Files or node ids, of which at least one must fail. Few and quick ones: they run for this mutant alone."""

    def applied(self, text: str) -> str:
        """The file with the mutant."""
        if (count := text.count(self.old)) != 1:
            raise DoesNotApply(f"{self.old!r} is {count} times in {self.file}, and must be once")
        return text.replace(self.old, self.new)


def _mutants(file: str, *rows: tuple[str, str, str, str]) -> tuple[Mutant, ...]:
    """Of one file. rows: name, old, new, and the test that must fail."""
    return tuple(Mutant(name, file, old, new, (test,)) for name, old, new, test in rows)


MUTANTS = (
    *_mutants(
        "trainer/formats/merge.py",
        (
            "weights act on both factors",
            "own = [scale(factors[name], weight) for",
            "own = [scale(factors[name], weight**2) for",
            "tests/formats/test_merge.py::test_weights_on_both_factors_are_squared_and_added_factors_bring_cross_terms",
        ),
        (
            "what cancels is written as rounding",
            "if norm(found) <= RESOLUTION * sum(map(norm, own)):",
            "if norm(found) == 0:",
            "tests/formats/test_merge.py::test_a_difference_of_equals_leaves_nothing",
        ),
        (
            "files for other models are merged",
            "wrong = [name for name, size in sizes.items() if name in known and known[name][1] != size]",
            "wrong = list[str]()",
            "tests/formats/test_merge.py::test_all_problems_are_told_at_once",
        ),
    ),
    *_mutants(
        "trainer/formats/extract.py",
        (
            "the difference is taken in the file's precision",
            ".to(device).double().sub_(",
            ".to(device).bfloat16().double().sub_(",
            "tests/formats/test_extract.py::test_the_lora_that_a_model_was_made_with_comes_back",
        ),
        (
            "rounding of quantised weights is extracted",
            "if dtypes[name] not in HEADER_DTYPES]",
            "if False]",
            "tests/formats/test_extract.py::test_models_that_do_not_belong_together_are_refused",
        ),
    ),
    *_mutants(
        "trainer/lowrank.py",
        (
            "the smallest singular values are kept",
            "[:, -min(rank, len(change)) :].flip(1)",
            "[:, : min(rank, len(change))].flip(1)",
            "tests/test_lowrank.py::test_the_nearest_of_a_whole_change_is_the_dense_svd_s_best",
        ),
    ),
    *_mutants(
        "trainer/export/request.py",
        (
            "a strength has no effect",
            "torch.addmm(weight.float(), b, a, alpha=part.strength)",
            "torch.addmm(weight.float(), b, a)",
            "tests/export/test_merged.py::test_each_weight_is_rounded_once",
        ),
        (
            "a weight is rounded between two LoRAs",
            "torch.addmm(weight.float(), b, a, alpha=part.strength)",
            "torch.addmm(weight.float(), b, a, alpha=part.strength).bfloat16()",
            "tests/export/test_merged.py::test_each_weight_is_rounded_once",
        ),
        (
            "a merged base is merged again",
            "if (file := sources.cached(base, MERGED_FILE)) is not None:",
            "if (file := None) is not None:",
            "tests/export/test_merged.py::test_a_merged_base_is_not_merged_again",
        ),
    ),
    *_mutants(
        "trainer/export/merged.py",
        (
            "small files are links, too",
            'if path.suffix == ".safetensors":\n        with',
            "if path.suffix:\n        with",
            "tests/export/test_merged.py::test_weights_are_shared_with_the_base_and_small_files_are_not",
        ),
        (
            "the index speaks of the old size",
            '"total_size": num_bytes',
            '"total_bytes": num_bytes',
            "tests/export/test_merged.py::test_the_index_of_shards_is_right",
        ),
    ),
    *_mutants(
        "trainer/export/onnx_model.py",
        (
            "rows count from the top",
            "(torch.arange(height, device=device) - (height - height // 2))",
            "torch.arange(height, device=device)",
            "tests/export/test_onnx.py::test_rope_is_that_of_diffusers",
        ),
        (
            "tokens turn backwards",
            "real * cos - imaginary * sin, real * sin + imaginary * cos",
            "real * cos + imaginary * sin, imaginary * cos - real * sin",
            "tests/export/test_onnx.py::test_real_rotations_give_the_velocity_of_diffusers",
        ),
        (
            "what fills a prompt is seen",
            "attn_mask=seen",
            "attn_mask=None",
            "tests/export/test_onnx.py::test_real_rotations_give_the_velocity_of_diffusers",
        ),
    ),
    *_mutants(
        "trainer/choice.py",
        (
            "noise chooses the step",
            "if lower > error:",
            "if lower > 0:",
            "tests/test_choice.py::test_a_later_step_must_be_better_by_more_than_the_error_of_the_difference",
        ),
        (
            "sigmas are a sample, too",
            "float(pairs.var(dim=0).mean())",
            "float(pairs.var())",
            "tests/test_choice.py::test_the_standard_error_is_that_of_a_stratified_sample",
        ),
        (
            "any rise is overfitting",
            "if higher > error:",
            "if higher > 0:",
            "tests/test_choice.py::test_verdicts",
        ),
    ),
    *_mutants(
        "trainer/stages.py",
        (
            "the schedule of a stage begins with the run",
            "learning_rate(self.train, step - self.begin)",
            "learning_rate(self.train, step)",
            "tests/test_stages.py::test_what_learns_and_how_fast_is_a_plain_loop_s",
        ),
        (
            "blocks are not chosen",
            "kept = [name for found in numbers.values() for name in found]",
            "pass",
            "tests/test_stages.py::test_what_learns_and_how_fast_is_a_plain_loop_s",
        ),
    ),
    *_mutants(
        "trainer/measure.py",
        (
            "a sample is compared with itself",
            "triu_indices(num_samples, num_samples, 1)",
            "triu_indices(num_samples, num_samples, 0)",
            "tests/compare/test_measures.py::test_similarity_and_diversity_are_means_over_pairs",
        ),
        (
            "the drift is that of the base",
            "moved = self._velocities(inputs, tracker)",
            "moved = plain",
            "tests/test_measure.py::test_the_drift_is_that_of_a_plain_reference",
        ),
    ),
    *_mutants(
        "trainer/loop.py",
        (
            "the average is not validated",
            "with torch.no_grad(), self._averaged():",
            "with torch.no_grad():",
            "tests/test_loop.py::test_an_average_is_validated_and_left_at_the_end",
        ),
        (
            "what does not learn has a gradient",
            "if not job.learns(step, name):",
            "if False:",
            "tests/test_loop.py::test_rates_of_single_parameters_and_what_does_not_learn",
        ),
        (
            "the best step's checkpoint is deleted",
            "settings.keep, self.result.chosen)",
            "settings.keep)",
            "tests/test_loop.py::test_the_checkpoint_of_the_best_step_is_kept",
        ),
        (
            "a resumed run does not know how long it has waited",
            'Result(saved.step, state["seconds"], state["validations"], errors,',
            'Result(saved.step, state["seconds"], state["validations"], {},',
            "tests/test_loop.py::test_patience_ends_a_run_and_a_resumed_one_knows",
        ),
    ),
    *_mutants(
        "trainer/page/write.py",
        (
            "the slider of a run that goes on begins at the best step so far",
            "left.chosen in steps and not left.running",
            "left.chosen in steps",
            "tests/test_page.py::test_the_slider_moves_all_prompts_and_begins_at_the_chosen_step",
        ),
    ),
    *_mutants(
        "trainer/page/pictures.py",
        (
            "the page shows pictures that were changed after training",
            "if content_hash(path) == self.hashes.get(key)",
            "if key in self.hashes",
            "tests/test_page.py::test_real_pictures_are_those_that_were_trained_on",
        ),
        (
            "the chosen step is not among the samples of the page",
            "wanted in steps and (place",
            "wanted is None and (place",
            "tests/test_page.py::test_steps_are_spread",
        ),
    ),
    *_mutants(
        "trainer/page/charts.py",
        (
            "a step with more drift beats one with less",
            "any(a <= x and",
            "any(a >= x and",
            "tests/test_page.py::test_a_beaten_step_is_hollow",
        ),
        (
            "a smoothed loss keeps the first point for ever",
            "points[index - window][1] if index >= window",
            "points[index - window][1] if index > window",
            "tests/test_page.py::test_smoothing_is_a_mean_of_the_last_ones",
        ),
    ),
    *_mutants(
        "trainer/diagnosis.py",
        (
            "captions that are worth more are the doubtful ones",
            "logs = _log_ratios(found.base, found.no_caption)",
            "logs = _log_ratios(found.no_caption, found.base)",
            "tests/test_diagnosis.py::test_a_wrong_caption_and_another_subject_are_named_first_each_with_its_reason",
        ),
        (
            "a wrong caption is taken for another subject, too",
            "        elif other >= THRESHOLD:",
            "        if other >= THRESHOLD:",
            "tests/test_diagnosis.py::test_a_wrong_caption_that_no_seed_can_fit_is_not_taken_for_another_subject",
        ),
        (
            "a few pictures are compared, too",
            "if len(values) < MIN_COMPARED:",
            "if len(values) < 1:",
            "tests/test_diagnosis.py::test_of_few_pictures_only_a_caption_that_does_harm_is_told",
        ),
        (
            "a caption below the threshold counts whole",
            "doubt if doubt >= THRESHOLD else doubt / 2",
            "doubt",
            "tests/test_diagnosis.py::test_a_caption_that_is_not_doubtful_counts_half_beside_the_subject",
        ),
        (
            "held-out pictures are diagnosed",
            'if record["part"] != "train":',
            "if False:",
            "tests/test_diagnosis.py::test_only_training_pictures_are_diagnosed_and_a_resumed_run_counts_once",
        ),
    ),
    *_mutants(
        "trainer/data/caption/templates.py",
        (
            "a field that no template knows is left in the caption",
            "for name in names if name not in known]",
            "for name in names if False]",
            "tests/data/test_caption.py::test_an_unknown_field_is_an_error_that_names_the_known_ones",
        ),
        (
            "that there is nothing to say is said in the caption",
            '"" if text.rstrip',
            "text if text.rstrip",
            "tests/data/test_caption.py::test_a_structured_chinese_answer",
        ),
    ),
    *_mutants(
        "trainer/data/caption/answers.py",
        (
            "the trigger that training puts in front is not counted",
            "with_trigger(self.trigger, text)[0] for text in texts",
            "text for text in texts",
            "tests/data/test_caption.py::test_what_was_done_to_an_answer_is_told",
        ),
        (
            "a caption is shortened to its first sentence",
            "re.finditer(end, text)][::-1]",
            "re.finditer(end, text)]",
            "tests/data/test_caption.py::test_a_long_caption_ends_with_a_sentence",
        ),
        (
            "an unfinished sentence stays",
            "answer.text if answer.ended else",
            "answer.text if True else",
            "tests/data/test_caption.py::test_what_was_done_to_an_answer_is_told",
        ),
    ),
    *_mutants(
        "trainer/data/caption/vision_model.py",
        (
            "padding is read as text",
            "(ids != self._padding).long()",
            "torch.ones_like(ids)",
            "tests/data/test_caption.py::test_a_batch_has_the_answers_of_each_picture_alone",
        ),
        (
            "large pictures are read whole",
            'min(size["longest_edge"], MAX_PIXELS)',
            'size["longest_edge"]',
            "tests/data/test_caption.py::test_large_pictures_are_scaled_down",
        ),
        (
            "a model without a head writes at random",
            'if tied or "lm_head.weight" in names:',
            "if True:",
            "tests/data/test_caption.py::test_a_model_without_a_language_head_is_refused",
        ),
    ),
    *_mutants(
        "trainer/data/caption/written.py",
        (
            "a picture that has changed keeps its caption",
            "self._entries[picture].sha256 == sha256",
            "True",
            "tests/data/test_caption.py::test_a_killed_command_goes_on_where_it_was",
        ),
        (
            "captions by another question are mixed",
            "for name, value in self._asked.items() if",
            "for name, value in self._asked.items() if False and",
            "tests/data/test_caption.py::test_captions_made_in_another_way_are_not_mixed",
        ),
        (
            "a caption that a person corrected is written anew",
            "known = [name for name in known if not self._text_file(name, pictures).exists()]",
            "known = [*known]",
            "tests/data/test_caption.py::test_a_killed_command_goes_on_where_it_was",
        ),
        (
            "a row that a person corrected is written anew",
            "new | rows if keep else",
            "rows | new if keep else",
            "tests/data/test_caption.py::test_rows_of_metadata",
        ),
        (
            "two pictures of one name share a caption",
            'stems[str(path.with_suffix(""))] > 1',
            "False",
            "tests/data/test_caption.py::test_captions_lie_as_the_pictures_do",
        ),
    ),
    *_mutants(
        "trainer/data/captions.py",
        (
            "captions beside the pictures count, too",
            "self._decided = {*self._given}",
            "self._decided = set()",
            "tests/data/test_caption.py::test_captions_elsewhere_count_instead_of_those_beside_the_pictures",
        ),
    ),
    *_mutants(
        "trainer/data/prior.py",
        (
            "a run may be resumed with other pictures for its prior",
            "(e.digest, *e.captions) for e in self.pictures",
            "0 for e in self.pictures",
            "tests/data/test_prior.py::test_other_pictures_in_the_folder_are_another_course",
        ),
        (
            "pictures drawn from other noise are taken from the cache",
            "config.seed + number, example",
            "number, example",
            "tests/data/test_prior.py::test_drawing_goes_on_where_it_was_stopped_and_the_plan_says_what_is_left",
        ),
        (
            "a prior with the trigger is trained against the subject",
            "has_trigger(data.trigger, text)]",
            "False]",
            "tests/data/test_prior.py::test_bad_input_is_told_at_once_before_a_model_loads",
        ),
    ),
    *_mutants(
        "trainer/hardware/memory.py",
        (
            "a prior needs no memory",
            "if self.prior_pixels else",
            "if False else",
            "tests/data/test_prior.py::test_memory_and_seconds_count_the_prior",
        ),
    ),
    *_mutants(
        "trainer/loop.py",
        (
            "the log has the loss of the last micro step alone",
            "means[name] +=",
            "means[name] =",
            "tests/data/test_prior.py::test_the_log_tells_the_parts_of_all_micro_steps",
        ),
    ),
    *_mutants(
        "trainer/hardware/seconds.py",
        (
            "drawing for the prior takes no time",
            "drawing_passes=_drawing_passes(prior)",
            "drawing_passes=0",
            "tests/data/test_prior.py::test_memory_and_seconds_count_the_prior",
        ),
    ),
    *_mutants(
        "trainer/data/audit/verdicts.py",
        (
            "what is to be looked at is left out, too",
            "verdict is None or verdict.verdict != LEAVE_OUT]",
            "verdict is None or verdict.verdict == KEEP]",
            "tests/data/test_audit.py::test_a_run_leaves_out_what_the_audit_says_to",
        ),
        (
            "a picture that was not audited is trained on",
            "if unknown and self.must_know:",
            "if False:",
            "tests/data/test_audit.py::test_an_audit_of_other_pictures",
        ),
    ),
    *_mutants(
        "trainer/data/audit/measures.py",
        (
            "a picture that is sharp along one axis is sharp",
            "min(lost / max",
            "max(lost / max",
            "tests/data/test_audit.py::test_a_picture_that_was_moved_is_not_sharp",
        ),
    ),
    *_mutants(
        "trainer/data/audit/judge.py",
        (
            "empty pictures are all copies of one another",
            "m is not None and m.flat <= rules.max_flat",
            "m is not None",
            "tests/data/test_audit.py::test_empty_pictures_are_no_copies",
        ),
    ),
    *_mutants(
        "trainer/data/audit/people.py",
        (
            "a palm alone is a hand",
            "if score[0] >= HAND:",
            "if True:",
            "tests/data/test_audit_finds.py::test_a_palm_alone_is_no_hand",
        ),
    ),
    *_mutants(
        "trainer/data/masks.py",
        (
            "weights of a mask do not have mean 1",
            "(found / found.mean()).float()",
            "found.float()",
            "tests/data/test_masks.py::test_latents_weigh_what_their_pixels_do_on_average",
        ),
        (
            "black and white of a mask are exchanged",
            "outside + (1 - outside) * pooled",
            "1 - (1 - outside) * pooled",
            "tests/data/test_masks.py::test_latents_weigh_what_their_pixels_do_on_average",
        ),
        (
            "a latent's weight is of pixels in other places",
            "width, mask.width // width).mean(dim=(1, 3))",
            "width, mask.width // width).mean(dim=(1, 3)).flip(1)",
            "tests/data/test_masks.py::test_latents_weigh_what_their_pixels_do_on_average",
        ),
        (
            "a mask is scaled, and not cropped as its picture is",
            "    return fitted(image, bucket)",
            "    return image.resize(bucket, Image.Resampling.LANCZOS)",
            "tests/data/test_masks.py::test_a_mask_lies_over_its_picture_to_the_pixel",
        ),
        (
            "a mask without a picture is passed over",
            "elif _partner(path) not in names(place):",
            "elif False:",
            "tests/data/test_masks.py::test_all_that_is_wrong_with_masks_is_told_at_once",
        ),
        (
            "a mask of another size is used",
            "if mask.size != size:",
            "if mask.size[0] > 10 * size[0]:",
            "tests/data/test_masks.py::test_all_that_is_wrong_with_masks_is_told_at_once",
        ),
        (
            "a mask that changes during a run is used",
            "if pixel_hash(image) != mask.digest:",
            "if not mask.digest:",
            "tests/data/test_masks.py::test_a_mask_that_changes_while_a_run_goes_on_is_told_of",
        ),
    ),
    *_mutants(
        "trainer/objective.py",
        (
            "masks do not weigh the loss",
            "inputs.noise, inputs.weights)",
            "inputs.noise)",
            "tests/test_objective.py::test_the_loss_of_a_masked_picture_is_the_mean_of_its_weighted_errors",
        ),
        (
            "the stable loss is the masked one",
            'f"{name}_masked" if way else name',
            'name if way else f"{name}_masked"',
            "tests/test_objective.py::test_beside_the_stable_losses_there_are_masked_ones",
        ),
        (
            "the weight of the prior does nothing",
            "inputs.stage.prior_weight * prior",
            "prior",
            "tests/data/test_prior.py::test_the_gradient_of_all_parts_is_that_of_a_plain_reference[prediction-False]",
        ),
        (
            "the base that is the prior has the adapter on",
            "with adapter.switched_off(self.transformer):\n            return",
            "if True:\n            return",
            "tests/data/test_prior.py::test_the_gradient_of_all_parts_is_that_of_a_plain_reference[prediction-False]",
        ),
        (
            "pictures of the prior have the noise of the training pictures",
            '"prior", step, part)',
            '"noise", step, part, 0)',
            "tests/data/test_prior.py::test_pictures_are_dealt_as_the_training_pictures_are",
        ),
        (
            "caption dropout does nothing",
            "qwen_image.EMPTY_PROMPT if drop else text",
            "text",
            "tests/test_objective.py::test_a_dropped_caption_is_the_empty_one",
        ),
        (
            "all pictures of a batch lose their captions together",
            "drops_caption(share, seed=run.seed, index=index, position=i)",
            "drops_caption(share, seed=run.seed, index=index, position=0)",
            "tests/test_objective.py::test_a_dropped_caption_is_the_empty_one",
        ),
        (
            "all pictures of a batch draw the same of their captions",
            "drawn_caption(e, seed=run.seed, index=index, position=i)",
            "drawn_caption(e, seed=run.seed, index=index, position=0)",
            "tests/data/test_folders.py::test_batches_are_those_of_the_reference",
        ),
        (
            "only the first resolution is encoded",
            "picture.buckets)}",
            "picture.buckets[:1])}",
            "tests/data/test_folders.py::test_each_picture_is_encoded_once_at_each_size_and_each_caption_once",
        ),
        (
            "further captions are not encoded",
            "for text in e.captions)",
            "for text in (e.caption,))",
            "tests/data/test_folders.py::test_each_picture_is_encoded_once_at_each_size_and_each_caption_once",
        ),
        (
            "another seed has the same noise",
            'flow.generator(run.seed, "noise"',
            'flow.generator(0, "noise"',
            "tests/test_objective.py::test_pictures_captions_and_noise_are_those_of_the_seed",
        ),
        (
            "another seed has the same batches",
            "batch_size, seed=run.seed",
            "batch_size, seed=0",
            "tests/test_objective.py::test_pictures_captions_and_noise_are_those_of_the_seed",
        ),
        (
            "another seed drops the same captions",
            "drops_caption(share, seed=run.seed",
            "drops_caption(share, seed=0",
            "tests/test_objective.py::test_pictures_captions_and_noise_are_those_of_the_seed",
        ),
        (
            "samples are squares whatever the pictures are",
            "size=self._plan.dataset.train[0].bucket",
            "size=(64, 64)",
            "tests/test_objective.py::test_samples_have_the_shape_of_the_training_pictures",
        ),
        (
            "batches repeat under gradient accumulation",
            "processes + part",
            "processes",
            "tests/test_objective.py::test_an_epoch_divided_into_micro_steps_and_processes_shows_each_picture_once",
        ),
        (
            "all micro steps and processes have the same noise",
            '"noise", step, part, 0',
            '"noise", step, 0',
            "tests/test_objective.py::test_latents_are_the_picture_s_own_and_no_two_batches_have_the_same_noise",
        ),
        (
            "sigmas are moved for four times as many tokens",
            "latents.shape[-2] // 4",
            "latents.shape[-2]",
            "tests/test_objective.py::test_sigmas_are_moved_by_the_number_of_the_picture_s_tokens",
        ),
        (
            "the padding of prompts is read as words",
            "inputs.prompt_embeds, inputs.mask",
            "inputs.prompt_embeds, None",
            "tests/test_objective.py::test_the_loss_of_a_batch_is_the_mean_of_each_picture_with_its_own_prompt",
        ),
        (
            "all prompts are drawn from one noise",
            "settings.seed + row for",
            "settings.seed for",
            "tests/test_objective.py::test_samples_are_drawn_as_configured_each_prompt_from_its_own_noise",
        ),
        (
            "samples have no guidance",
            "settings.true_cfg_scale",
            "1.0",
            "tests/test_objective.py::test_samples_are_drawn_as_configured_each_prompt_from_its_own_noise",
        ),
        (
            "the stable losses are of all pictures",
            "examples[:count]",
            "examples",
            "tests/test_objective.py::test_the_stable_losses_are_of_so_many_pictures",
        ),
        (
            "the adapter's dropout stays off after the first validation",
            "self.transformer.train()",
            "pass",
            "tests/test_objective.py::test_dropout_is_off_while_validating_and_on_again_after",
        ),
        (
            "validations have the adapter's dropout",
            "self.transformer.eval()",
            "pass",
            "tests/test_objective.py::test_dropout_is_off_while_validating_and_on_again_after",
        ),
    ),
    *_mutants(
        "trainer/run.py",
        (
            "a run has no gradient checkpointing",
            "gradient_checkpointing=settings.train.gradient_checkpointing",
            "gradient_checkpointing=False",
            "tests/test_run.py::test_gradient_checkpointing_is_at_work_where_it_is_configured",
        ),
    ),
    *_mutants(
        "trainer/hardware/offload.py",
        (
            "blocks that checkpointing computes again stay on the GPU",
            "always_call=True",
            "always_call=False",
            "tests/hardware/test_offload.py::test_gradients_are_equal_and_blocks_come_in_order[3]",
        ),
        (
            "blocks are expected in the order of the forward pass only",
            "last == index + 1 or last == index > 0",
            "False",
            "tests/hardware/test_offload.py::test_gradients_are_equal_and_blocks_come_in_order[3]",
        ),
        (
            "no block comes ahead",
            "0 <= following < len(self._blocks)",
            "False",
            "tests/hardware/test_offload.py::test_a_pass_that_breaks_off_leaves_the_weights_where_they_lie",
        ),
        (
            "a block is used before it has come",
            "torch.cuda.current_stream(self._device).wait_event(fetched.event)",
            "pass",
            "tests/hardware/test_offload.py::test_streams_wait_for_each_other",
        ),
        (
            "a block comes into memory that is still in use",
            "self._stream.wait_stream(torch.cuda.current_stream(self._device))",
            "pass",
            "tests/hardware/test_offload.py::test_streams_wait_for_each_other",
        ),
        (
            "layers in 4 bits keep their weights on the GPU",
            "_replace_4bit(block)\n    memories",
            "pass\n    memories",
            "tests/hardware/test_offload.py::test_quantised_blocks_are_fetched_as_they_are_stored[nf4]",
        ),
        (
            "all blocks lie on the GPU",
            "child is not blocks and child not in chosen",
            "child is not blocks",
            "tests/hardware/test_offload.py::test_all_but_the_offloaded_blocks_is_on_the_device",
        ),
    ),
    *_mutants(
        "trainer/hardware/parallel.py",
        (
            "accelerate moves offloaded blocks to the GPU",
            "False if placed else None",
            "None",
            "tests/hardware/test_offload.py::test_accelerate_moves_nothing_that_is_meant_to_stay",
        ),
    ),
    *_mutants(
        "trainer/qwen_image.py",
        (
            "offloaded activations stay on the GPU",
            "offload.checkpoint_on_cpu if offload_activations else None",
            "None",
            "tests/hardware/test_offload.py::test_what_checkpointing_keeps_goes_to_the_cpu_and_nothing_else",
        ),
        (
            "gradient checkpointing is never switched on",
            "transformer.enable_gradient_checkpointing(offload.checkpoint_on_cpu if offload_activations else None)",
            "pass",
            "tests/test_qwen_image.py::test_gradient_checkpointing_keeps_less_and_changes_nothing",
        ),
        (
            "models of the family that are trained in another way are fetched first",
            "partial(_misfits, base, tuple(parts)), early)",
            "partial(_misfits, base, tuple(parts)))",
            "tests/test_published.py"
            "::test_other_models_of_the_family_are_refused_by_name_before_anything_large_is_fetched",
        ),
        (
            "more is read of captions than a pipeline reads of prompts",
            "max_sequence_length=PROMPT_LIMIT",
            "max_sequence_length=1024",
            "tests/test_qwen_image.py::test_captions_and_prompts_are_read_as_far_as_the_pipeline_reads_them",
        ),
        (
            "the transformer is told the share of the picture instead of the noise's",
            "timestep=sigmas.to(latents)",
            "timestep=(1 - sigmas).to(latents)",
            "tests/test_qwen_image.py::test_velocity_is_what_the_pipeline_s_loop_asks_the_transformer_for",
        ),
        (
            "weak guidance is none",
            "true_cfg_scale > 1 and",
            "true_cfg_scale > 2 and",
            "tests/test_qwen_image.py::test_guidance_leads_away_from_the_negative_prompt",
        ),
        (
            "another tokenizer is the same model",
            'ENCODERS = ("vae", "text_encoder", "tokenizer")',
            'ENCODERS = ("vae", "text_encoder")',
            "tests/test_qwen_image.py::test_another_tokenizer_is_another_identity",
        ),
    ),
    *_mutants(
        "trainer/plan.py",
        (
            "a run may be resumed with another table of its initializer",
            ", method: config.to_dict(self.start.options)}",
            "}",
            "tests/test_plan.py::test_settings_of_the_start_and_of_training_are_part_of_the_course",
        ),
        (
            "a run may be resumed with other weights of the base",
            "qwen_image.identity(self.config.model.base, qwen_image.PARTS)",
            "None",
            "tests/test_resume.py::test_other_weights_of_the_base_are_refused",
        ),
        (
            "a run may be resumed with another file of its start",
            'f"init.{method}": self.start.identity()',
            'f"init.{method}": None',
            "tests/test_resume.py::test_the_start_s_file_may_be_gone_but_not_another",
        ),
        (
            "a run may be resumed with other repeats",
            'values["data"] |= course_of_folders(self.config.data, self.dataset)',
            'values["data"]["folders"] = {}',
            "tests/data/test_folders.py::test_a_run_goes_on_exactly_but_not_with_other_folders",
        ),
        (
            "a run may be resumed with other captions",
            "(e.digest, *e.captions)",
            '(e.digest, "")',
            "tests/test_run.py::test_the_course_is_what_decides_training",
        ),
    ),
    *_mutants(
        "trainer/data/cache.py",
        (
            "the keys of a cache depend on the order of a table's keys",
            "sort_keys=True",
            "sort_keys=False",
            "tests/data/test_cache.py::test_a_key_tells_everything_apart",
        ),
        (
            "NaN is kept in the cache",
            "not torch.isfinite(tensor).all()",
            "False",
            "tests/data/test_cache.py::test_nan_is_an_error_and_is_not_kept",
        ),
        (
            "what is in the cache twice is read in another order",
            "[found[k] for k in keys]",
            "[found[k] for k in sorted(keys)]",
            "tests/data/test_cache.py::test_what_is_known_is_not_computed_again",
        ),
    ),
    *_mutants(
        "trainer/data/encode.py",
        (
            "latents of another size are read from the cache",
            "model, e.digest, e.bucket)",
            "model, e.digest)",
            "tests/data/test_cache.py::test_the_same_picture_at_another_size_is_encoded_anew",
        ),
        (
            "prompts of another precision are read from the cache",
            "model, str(dtype), qwen_image",
            "model, qwen_image",
            "tests/data/test_cache.py::test_each_prompt_has_its_own_embedding_in_the_precision_asked_for",
        ),
    ),
    *_mutants(
        "trainer/data/dataset.py",
        (
            "a folder's own settings are not used",
            "return [replace(self, **settings) for settings in own] or [self]",
            'return [replace(self, images=settings["images"]) for settings in own] or [self]',
            "tests/data/test_folders.py::test_the_plan_names_folders_and_counts_items",
        ),
        (
            "a folder inside of another is read twice",
            "below = [p for p in below if p.resolve() not in apart]",
            "",
            "tests/data/test_folders.py::test_a_folder_inside_of_another_is_read_once",
        ),
        (
            "copies of training pictures are held out",
            "copies[example.pixels] == 1",
            "copies[example.pixels] >= 1",
            "tests/data/test_dataset.py::test_copies_are_noted_and_never_held_out",
        ),
        (
            "other pictures are held out when a file is renamed",
            'f"{seed} {e.digest}"',
            'f"{seed} {e.path}"',
            "tests/data/test_dataset.py::test_a_number_of_pictures_is_held_out_by_seed",
        ),
        (
            "buckets are compared by the difference of their ratios",
            "abs(math.log(size[0] / size[1]) - math.log(option[0] / option[1]))",
            "abs(size[0] / size[1] - option[0] / option[1])",
            "tests/data/test_dataset.py::test_a_picture_and_the_same_one_turned_have_the_same_bucket_turned",
        ),
    ),
    *_mutants(
        "trainer/data/folders.py",
        (
            "a folder may be named twice",
            "same != number",
            "False",
            "tests/data/test_folders.py::test_all_that_is_wrong_with_folders_is_told_at_once",
        ),
    ),
    *_mutants(
        "trainer/data/epoch.py",
        (
            "pictures have the same partners in each epoch",
            '"shuffle", epoch, *size',
            '"shuffle", *size',
            "tests/data/test_dataset.py::test_a_batch_depends_on_seed_and_index_alone",
        ),
        (
            "the last batch of a bucket is short",
            "range(start, start + batch_size)",
            "range(start, min(start + batch_size, len(group)))",
            "tests/data/test_dataset.py::test_each_epoch_shows_every_picture_in_batches_of_one_bucket",
        ),
        (
            "folders are not repeated",
            "[example] * example.repeats",
            "[example]",
            "tests/data/test_folders.py::test_batches_are_those_of_the_reference",
        ),
        (
            "a picture has its first size in every batch",
            ".at(size)",
            "",
            "tests/data/test_folders.py::test_batches_are_those_of_the_reference",
        ),
        (
            "the last caption is never drawn",
            "torch.randint(len(example.captions)",
            "torch.randint(len(example.captions) - 1",
            "tests/data/test_folders.py::test_captions_are_drawn_evenly_and_by_seed_index_and_position",
        ),
        (
            "captions are kept at the rate at which they should be dropped",
            "position)) < probability",
            "position)) > probability",
            "tests/data/test_dataset.py::test_captions_are_dropped_at_the_rate_asked_for_and_always_the_same_ones",
        ),
        (
            "a picture may move to a folder of other repeats",
            '"resolution": own.resolution, "pictures": pictures}',
            '"resolution": own.resolution}',
            "tests/data/test_folders.py::test_a_picture_that_moves_to_a_folder_of_other_repeats_is_another_course",
        ),
    ),
    *_mutants(
        "trainer/flow.py",
        (
            "the velocity has the wrong sign",
            "return noise - latents",
            "return latents - noise",
            "tests/test_flow.py::test_interpolation_and_velocity_agree_with_the_scheduler",
        ),
        (
            "noise and latents are mixed the wrong way round",
            "(1 - sigmas) * latents + sigmas * noise",
            "sigmas * latents + (1 - sigmas) * noise",
            "tests/test_flow.py::test_interpolation_and_velocity_agree_with_the_scheduler",
        ),
        (
            "the shift lacks its denominator's one",
            "(1 + (shift - 1) * sigmas)",
            "(shift - (shift - 1) * sigmas)",
            "tests/test_flow.py::test_a_fixed_shift_moves_the_logit_by_its_logarithm",
        ),
        (
            "the stable loss has a sigma of zero",
            "torch.float32) + 0.5)",
            "torch.float32))",
            "tests/test_flow.py::test_stratified_sigmas",
        ),
    ),
    *_mutants(
        "trainer/lowrank.py",
        (
            "scaling scales twice",
            "LowRank(x.a, x.b * factor)",
            "LowRank(x.a * factor, x.b * factor)",
            "tests/test_lowrank.py::test_concatenate_adds_and_scale_multiplies",
        ),
        (
            "energy is the sum of singular values without their squares",
            "float(s[:keep].square().sum())",
            "float(s[:keep].sum())",
            "tests/test_lowrank.py::test_truncation_is_the_dense_svd_s_best",
        ),
        (
            "small seeds lose their directions",
            "s > s[0] * RESOLUTION",
            "s > RESOLUTION",
            "tests/test_lowrank.py::test_very_small_and_very_large_factors_keep_their_rank",
        ),
        (
            "random rows have the bound of another size",
            "bound = 1 / math.sqrt(x.a.shape[1])",
            "bound = 1 / math.sqrt(x.b.shape[0])",
            "tests/test_lowrank.py::test_random_rows_follow_the_law_of_a_linear_layer",
        ),
        (
            "the rank for an energy is one too small",
            ".sum()) + 1)",
            ".sum()))",
            "tests/test_lowrank.py::test_the_rank_for_an_energy_is_the_smallest_that_keeps_it",
        ),
        (
            "the energies of layers are not added up",
            "+= own",
            "= own",
            "tests/test_lowrank.py::test_the_rank_for_an_energy_is_the_smallest_that_keeps_it",
        ),
        (
            "what layers keep is not weighted by their energy",
            "shares[name] * energies[name]",
            "shares[name]",
            "tests/test_lowrank.py::test_what_is_kept_of_several_layers_is_weighted_by_their_energy",
        ),
        (
            "the difference of two changes is their sum",
            "scale(y, -1.0)",
            "y",
            "tests/test_lowrank.py::test_norm_and_relative_difference_equal_the_dense_ones",
        ),
    ),
    *_mutants(
        "initializers/i2l/training/batch_lora.py",
        (
            "a block that is computed again has no LoRA",
            "checkpoint(with_factors, *inputs)",
            "checkpoint(block, *inputs)",
            "tests/initializers/i2l/training/test_train.py"
            "::test_blocks_that_are_computed_again_have_the_loras_of_their_forward_pass",
        ),
    ),
    *_mutants(
        "trainer/adapter.py",
        (
            "a frozen LoRA stays on the base that is the prior",
            "for hook in added:\n        hook.on = False",
            "for hook in added:\n        hook.on = True",
            "tests/data/test_prior.py::test_switched_off_is_the_base_and_leaves_the_rest_as_it_was",
        ),
        (
            "what a seed lost when it was read counts as kept",
            "kept=share * read, padded",
            "kept=share, padded",
            "tests/formats/test_methods.py::test_modules_of_a_smaller_rank_are_truncated_further",
        ),
        (
            "the adapter of an offloaded block lies on the CPU",
            "parameter.detach().to(device, torch.float32)",
            "parameter.detach().float()",
            "tests/hardware/test_offload.py::test_all_but_the_offloaded_blocks_is_on_the_device",
        ),
        (
            "a seed is not divided by PEFT's scale",
            "factors.b / scaling",
            "factors.b",
            "tests/test_adapter.py::test_the_seeded_model_computes_with_w_plus_dw",
        ),
        (
            "all modules have the same random rows",
            'generator(random_seed, "adapter", name)',
            'generator(random_seed, "adapter")',
            "tests/test_adapter.py::test_each_module_has_random_rows_of_its_own",
        ),
        (
            "a seed's ranks are ignored where the configuration has one",
            "{**settings.rank_pattern, **seed.rank_pattern}",
            "{**seed.rank_pattern, **settings.rank_pattern}",
            "tests/test_adapter.py::test_a_seed_s_ranks_go_before_the_configuration_s",
        ),
        (
            "layers with a rank of their own have another scale",
            "if config.alpha is None else {}",
            "if config.alpha is not None else {}",
            "tests/test_adapter.py::test_a_layer_with_a_rank_of_its_own_has_that_alpha_unless_alpha_is_set",
        ),
        (
            "a smaller seed is not balanced",
            "if rank(factors) == limit",
            "if rank(factors) <= limit",
            "tests/test_adapter.py::test_a_smaller_seed_is_balanced",
        ),
        (
            "what is dropped counts as no energy",
            "lost[name] = energies[name] = before",
            "lost[name] = before",
            "tests/test_adapter.py::test_the_report_says_what_is_random_and_what_is_lost",
        ),
        (
            "rows that have no effect yet are drawn anew",
            "(factors.a != 0).any(dim=1) | (factors",
            "(factors.a != 0).any(dim=1) & (factors",
            "tests/test_adapter.py::test_rows_that_have_no_effect_yet_stay_as_they_are",
        ),
    ),
    *_mutants(
        "trainer/checkpoint.py",
        (
            "one checkpoint less is kept",
            "[:-keep]",
            "[: 1 - keep]",
            "tests/test_checkpoint.py::test_the_oldest_are_deleted_and_what_a_killed_run_left",
        ),
        (
            "a run goes on from the oldest checkpoint",
            "load(folders[-1])",
            "load(folders[0])",
            "tests/test_checkpoint.py::test_the_newest_is_found_and_half_written_ones_do_not_count",
        ),
        (
            "any key that begins like a free one may change",
            'f"{name}.".startswith(f"{key}.")',
            "name.startswith(key)",
            "tests/test_checkpoint.py::test_a_course_is_what_may_not_change",
        ),
        (
            "the count of steps of an 8-bit optimizer is forgotten",
            "return {key: _with_tensors(one, tensors) for key, one in value.items()}",
            'return {key: _with_tensors(one, tensors) for key, one in value.items() if key != "step"}',
            "tests/test_checkpoint.py::test_an_optimizer_goes_on_as_if_it_had_never_stopped",
        ),
    ),
    *_mutants(
        "trainer/formats/lora.py",
        (
            "a file's alpha is ignored",
            'tensors["b"] * scale',
            'tensors["b"]',
            "tests/formats/test_layouts.py::test_every_layout_gives_the_same_weights",
        ),
        (
            "keys that are left out are read with the others",
            "*chain(*left_out.values())",
            "*chain(*left_out)",
            "tests/formats/test_methods.py::test_a_text_encoder_s_part_is_left_out_and_named",
        ),
        (
            "an alpha of our own changes dW the wrong way",
            "len(a) / alpha",
            "alpha / len(a)",
            "tests/formats/test_layouts.py::test_another_alpha_leaves_dw_as_it_is",
        ),
    ),
    *_mutants(
        "trainer/formats/origin.py",
        (
            "rslora is read as plain LoRA",
            "math.sqrt(rank) if",
            "rank if",
            "tests/formats/test_layouts.py::test_a_folder_of_peft_gives_peft_s_own_delta",
        ),
        (
            "PEFT's rank of single layers is ignored",
            'patterns["rank_pattern"]',
            "[]",
            "tests/formats/test_methods.py::test_a_folder_of_peft_gives_peft_s_own_delta",
        ),
    ),
    *_mutants(
        "trainer/lycoris.py",
        (
            "a LoKr is truncated to its least singular values",
            ".sort(descending=True)",
            ".sort()",
            "tests/formats/test_methods.py::test_a_truncated_read_is_the_svd_of_dw",
        ),
        (
            "what truncation takes from a LoKr is not told",
            "values[keep:].square()",
            "values[len(values) :].square()",
            "tests/formats/test_methods.py::test_a_truncated_read_is_the_svd_of_dw",
        ),
    ),
    *_mutants(
        "trainer/formats/methods.py",
        (
            "alpha has an effect on whole matrices",
            "shapes[part][0]\n    return None",
            "shapes[part][0]\n    return 1",
            "tests/formats/test_methods.py::test_dw_is_that_of_the_formula",
        ),
    ),
    *_mutants(
        "trainer/formats/layouts.py",
        (
            "old files of diffusers are read with a and b swapped",
            'match["half"].endswith(("A", "down"))',
            'match["half"].endswith(("A", "_down"))',
            "tests/formats/test_layouts.py::test_every_layout_gives_the_same_weights",
        ),
        (
            "a module that is in a file twice is taken once",
            "name) is not None",
            "name) is None",
            "tests/formats/test_layouts.py::test_damaged_and_foreign_files_are_named",
        ),
    ),
    *_mutants(
        "trainer/formats/convert.py",
        (
            "the second file of musubi-tuner has the first one's alpha",
            "layout=trainer.layout, alpha=1.0)",
            "layout=trainer.layout, alpha=alpha)",
            "tests/formats/test_trainers.py::test_musubi_has_a_second_file_for_its_default_alpha",
        ),
        (
            "what was lost before is forgotten",
            'left * (1.0 if origin.get("energy_kept") is None else origin["energy_kept"])',
            "left",
            "tests/formats/test_trainers.py::test_the_energy_that_is_left_stands_in_the_file",
        ),
        (
            "modules that the recipe drops count as kept",
            "if module in trained:",
            "if trained:",
            "tests/formats/test_trainers.py::test_modules_that_are_dropped_are_not_left",
        ),
        (
            "rows that are filled in are the same in all modules",
            'pad(nothing, given.rank, generator("hand off", module))',
            'pad(nothing, given.rank, generator("hand off"))',
            "tests/formats/test_trainers.py::test_rows_that_are_filled_in_are_each_module_s_own",
        ),
        (
            "the energy that is kept is told as lost",
            "(1 - kept[module])",
            "kept[module]",
            "tests/formats/test_trainers.py::test_the_shares_that_are_told_are_those_of_the_file",
        ),
        (
            "half of the rounding is told",
            "LowRank(x.a.to(dtype).float(), ",
            "LowRank(x.a, ",
            "tests/formats/test_trainers.py::test_the_shares_that_are_told_are_those_of_the_file",
        ),
    ),
    *_mutants(
        "trainer/compare/plan.py",
        (
            "the control bias-only has all experts",
            "'init.i2l.experts=[\"bias\"]',",
            "",
            "tests/compare/test_plan.py::test_the_control_bias_only_has_no_other_expert",
        ),
        (
            "each run of a comparison is planned with the first start",
            "config=settings, start=cell.arm.start",
            "config=settings",
            "tests/compare/test_plan.py::test_the_table_of_an_initializer_is_part_of_its_own_runs_fingerprints",
        ),
        (
            "another length is the same run",
            "run, lengths, ",
            "run, ",
            "tests/compare/test_plan.py::test_a_setting_of_all_runs_is_part_of_all_fingerprints",
        ),
        (
            "other held-out pictures are the same run",
            "shown, held_out, settings",
            "shown, settings",
            "tests/compare/test_plan.py::test_another_picture_or_caption_makes_other_runs_of_those_who_see_it",
        ),
        (
            "other wrong pictures are the same run",
            "control, shown, ",
            "control, ",
            "tests/compare/test_plan.py::test_another_picture_or_caption_makes_other_runs_of_those_who_see_it",
        ),
        (
            "wrong pictures are of another group",
            " if one.group == subject.group]",
            "]",
            "tests/compare/test_plan.py::test_wrong_pictures_are_those_of_the_next_subject_of_the_group",
        ),
        (
            "controls have the fingerprint of what they control",
            "cell.arm.control, shown",
            "shown",
            "tests/compare/test_plan.py::test_runs_of_one_comparison_have_different_fingerprints",
        ),
    ),
    *_mutants(
        "trainer/compare/runs.py",
        (
            "the control of equal norm has the full rank",
            "truncate(factors, rank)[0] if rank else factors",
            "factors",
            "tests/compare/test_runs.py::test_the_control_of_equal_norm_is_made_of_the_arm_s_own_seed",
        ),
        (
            "the control of equal norm has the configuration's rank",
            "settings = adapter.settings_for(seed, settings)",
            "pass",
            "tests/compare/test_runs.py::test_the_control_of_equal_norm_has_the_ranks_that_the_seed_asks_for",
        ),
        (
            "the control of equal norm has three times the norm",
            "with_random_directions(kept,",
            "with_random_directions(kept._replace(b=3 * kept.b),",
            "tests/compare/test_runs.py::test_the_control_of_equal_norm_has_the_ranks_that_the_seed_asks_for",
        ),
        (
            "each arm starts from random rows of its own",
            "random_seed=cell.seed",
            "random_seed=cell.seed + len(cell.arm.name)",
            "tests/compare/test_runs.py::test_all_arms_of_a_seed_start_from_the_same_random_rows",
        ),
        (
            "each seed of an arm has the seed's prediction of the first",
            "context, seed=seed, ",
            "context, ",
            "tests/compare/test_runs.py::test_each_arm_predicts_from_the_subject_s_pictures_with_the_run_s_seed",
        ),
        (
            "an arm trains another arm's seed",
            "cell.subject.name, cell.arm.name, cell.seed)",
            "cell.subject.name, cell.seed)",
            "tests/compare/test_runs.py::test_a_seed_is_asked_for_once_and_never_taken_for_another_s",
        ),
        (
            "a subject is compared with another's base",
            "if subject.name not in self._base_losses:",
            "if not self._base_losses:",
            "tests/compare/test_runs.py::test_the_loss_of_the_base_is_that_of_each_subject_s_held_out_pictures",
        ),
        (
            "wrong pictures are the right ones",
            "            shown = other\n",
            "            shown = subject\n",
            "tests/compare/test_runs.py::test_each_arm_predicts_from_the_subject_s_pictures_with_the_run_s_seed",
        ),
        (
            "a frozen LoRA stays for the next run",
            "handle.remove()",
            "pass",
            "tests/compare/test_runs.py::test_nothing_of_a_run_stays_on_the_base",
        ),
        (
            "samples of a comparison have no guidance",
            "settings.true_cfg_scale",
            "1.0",
            "tests/compare/test_runs.py::test_samples_are_drawn_as_configured_from_the_same_noises_for_each_prompt",
        ),
        (
            "samples of one prompt are one sample",
            "settings.seed + number",
            "settings.seed",
            "tests/compare/test_runs.py::test_samples_are_drawn_as_configured_from_the_same_noises_for_each_prompt",
        ),
        (
            "a comparison has no gradient checkpointing",
            "gradient_checkpointing=train.gradient_checkpointing",
            "gradient_checkpointing=False",
            "tests/compare/test_runs.py::test_the_base_is_set_up_as_configured",
        ),
    ),
    *_mutants(
        "trainer/compare/statistics.py",
        (
            "the best rate is that of the luckiest seed",
            "mean(rates[rate]), rate)",
            "min(rates[rate]), rate)",
            "tests/compare/test_statistics.py::test_neither_a_lucky_nor_an_unlucky_seed_chooses_the_rate",
        ),
        (
            "a run that reaches the baseline's best never does",
            'point["val_loss"] <= goal',
            'point["val_loss"] < goal',
            "tests/compare/test_statistics.py::test_steps_and_seconds_to_the_baselines_best",
        ),
        (
            "the initializer's time costs nothing",
            'float(run["init_seconds"] + seconds)',
            "float(seconds)",
            "tests/compare/test_statistics.py::test_steps_and_seconds_to_the_baselines_best",
        ),
        (
            "the initializer's time is free where a run never gets there",
            '_with_start(run, curve[-1]["seconds"])',
            'curve[-1]["seconds"]',
            "tests/compare/test_statistics.py::test_a_run_that_never_gets_there_counts_whole_with_its_initializer",
        ),
        (
            "a run that never gets there takes no time",
            "row.length_seconds if row.seconds is None",
            "0 if row.seconds is None",
            "tests/compare/test_statistics.py::test_a_run_that_never_gets_there_counts_whole_with_its_initializer",
        ),
        (
            "the ratio of areas is upside down",
            "row.area / row.baseline_area",
            "row.baseline_area / row.area",
            "tests/compare/test_statistics.py::test_the_ratio_of_areas_is_the_arm_s_by_the_baseline_s",
        ),
        (
            "the interval holds 90 of 100",
            "(2.5, 97.5)",
            "(5.0, 95.0)",
            "tests/compare/test_statistics.py::test_the_interval_holds_95_of_100",
        ),
        (
            "subjects are not resampled",
            "random.integers(len(groups), size=len(groups))",
            "range(len(groups))",
            "tests/compare/test_statistics.py::test_the_interval_is_over_subjects_and_not_over_their_many_seeds",
        ),
        (
            "seeds are not resampled",
            "random.integers(len(group), size=len(group))",
            "range(len(group))",
            "tests/compare/test_statistics.py::test_a_subject_with_many_seeds_counts_as_one_of_few_when_resampled",
        ),
    ),
    *_mutants(
        "trainer/template.py",
        (
            "captions become a part of the page's HTML",
            "autoescape=True",
            "autoescape=False",
            "tests/test_page.py::test_texts_are_escaped",
        ),
    ),
    *_mutants(
        "trainer/studio.py",
        (
            "a strength is not applied",
            "Worn(path.stem, weights, asked.strength, ",
            "Worn(path.stem, weights, 1.0, ",
            "tests/evaluate/test_evaluate.py::test_an_evaluation_is_what_plain_references_say",
        ),
        (
            "LoRAs are put on at full strength",
            "scale(factors, one.strength)",
            "scale(factors, 1.0)",
            "tests/test_studio.py::test_together_is_the_weighted_sum",
        ),
        (
            "LoRAs stay on",
            "handle.remove()",
            "pass",
            "tests/test_studio.py::test_worn_loras_draw_what_a_base_with_their_sum_draws",
        ),
    ),
    *_mutants(
        "trainer/qwen_image.py",
        (
            "both branches wear the negative one's LoRA",
            'if name == "uncond" else nullcontext()',
            "if name else nullcontext()",
            "tests/test_studio.py::test_the_negative_branch_has_its_own_lora",
        ),
    ),
    *_mutants(
        "trainer/draw/library.py",
        (
            "the template's words count as likeness",
            "unit = normalize(texts - middle, dim=1)",
            "unit = normalize(texts, dim=1)",
            "tests/draw/test_library.py",
        ),
        (
            "something is always near",
            "if value > limit:",
            "if True:",
            "tests/draw/test_library.py::test_none_is_chosen_where_nothing_is_near",
        ),
    ),
    *_mutants(
        "trainer/draw/run.py",
        (
            "a picture that is there is drawn again",
            "if not (folder / cell.name).is_file()]",
            "if cell.name]",
            "tests/draw/test_draw.py::test_a_stopped_request_goes_on_and_another_one_is_refused",
        ),
        (
            "any folder is gone on with",
            "all(found.get(name) == value for name, value in request.items())",
            "bool(request)",
            "tests/draw/test_draw.py::test_a_stopped_request_goes_on_and_another_one_is_refused",
        ),
        (
            "a strength of the sheet replaces that of the file",
            "replace(one, strength=one.strength * strength)",
            "replace(one, strength=strength)",
            "tests/draw/test_draw.py::test_loras_and_strengths_side_by_side",
        ),
    ),
    *_mutants(
        "trainer/evaluate/metrics.py",
        (
            "covariances are divided by N",
            "math.sqrt(len(rows) - 1)",
            "math.sqrt(len(rows))",
            "tests/evaluate/test_metrics.py::test_the_frechet_distance_is_the_library_s",
        ),
        (
            "a picture counts as its own neighbour",
            "within_x.fill_diagonal_(0)",
            "pass",
            "tests/evaluate/test_metrics.py::test_the_kernel_distance_is_the_library_s",
        ),
        (
            "a row that is left out stays in its column",
            "within.sum() - 2 * within.sum(1)",
            "within.sum() - within.sum(1)",
            "tests/evaluate/test_metrics.py::test_its_error_is_the_jackknife_s_by_a_plain_loop",
        ),
    ),
    *_mutants(
        "trainer/evaluate/measures.py",
        (
            "redrawing does not end at the picture",
            "torch.linspace(sigma, 0, steps + 1)",
            "torch.linspace(sigma, 0.1, steps + 1)",
            "tests/evaluate/test_evaluate.py::test_a_perfect_velocity_redraws_the_picture",
        ),
        (
            "samples that are there are drawn again",
            "all(sample.path.is_file() for sample in drawn)",
            "not drawn",
            "tests/evaluate/test_evaluate.py::test_an_evaluation_that_was_stopped_goes_on_to_the_same_bytes",
        ),
    ),
    *_mutants(
        "trainer/evaluate/folder.py",
        (
            "any evaluation that was stopped is gone on with",
            "before.get(name) != wanted[name]",
            "name not in before",
            "tests/evaluate/test_evaluate.py::test_a_folder_of_another_evaluation_that_was_stopped_is_refused",
        ),
        (
            "a LoRA without all its samples is taken for whole",
            "(self.numbers, *redrawn, *(one.path for one in self.samples))",
            "(self.numbers, *redrawn)",
            "tests/evaluate/test_evaluate.py::test_an_evaluation_that_was_stopped_goes_on_to_the_same_bytes",
        ),
    ),
    *_mutants(
        "trainer/evaluate/results.py",
        (
            "likeness is with the training pictures",
            "{name: _likeness(rows, held_out) for name, rows in drawn.items()}",
            "{name: _likeness(rows, space.train) for name, rows in drawn.items()}",
            "tests/evaluate/test_evaluate.py::test_an_evaluation_is_what_plain_references_say",
        ),
    ),
    *_mutants(
        "trainer/evaluate/blind.py",
        (
            "the first LoRA is always on the left",
            "torch.rand((), generator=random) < 0.5",
            "torch.rand((), generator=random) < 2",
            "tests/evaluate/test_blind.py::test_each_prompt_and_seed_is_a_pair_with_sides_by_the_seed",
        ),
    ),
    *_mutants(
        "trainer/evaluate/votes.py",
        (
            "ties count as lost",
            "wilson(wins, wins + losses)",
            "wilson(wins, wins + losses + counts[None])",
            "tests/evaluate/test_votes.py::test_votes_are_joined_with_the_key",
        ),
        (
            "the earlier of two files counts",
            "ballots[ballot] = newer",
            "ballots[ballot] = older",
            "tests/evaluate/test_votes.py::test_of_a_page_that_was_saved_twice_the_later_file_counts",
        ),
    ),
    *_mutants(
        "trainer/compare/measures.py",
        (
            "samples are compared with the training pictures",
            "float((own @ real.T).mean())",
            "float((own @ shown.T).mean())",
            "tests/compare/test_measures.py::test_similarity_and_diversity_are_means_over_pairs",
        ),
        (
            "embeddings are compared with their lengths",
            "torch.nn.functional.normalize(rows.double(), dim=1)",
            "rows.double()",
            "tests/compare/test_measures.py::test_similarity_and_diversity_are_means_over_pairs",
        ),
    ),
    *_mutants(
        "initializers/i2l/predictions.py",
        (
            "predictions of another expert are read from the cache",
            "content_hash(expert_file.path), ",
            "",
            "tests/initializers/i2l/test_initializer.py::test_what_another_file_predicted_is_not_read",
        ),
        (
            "predictions from other pictures are read from the cache",
            "context.device.type, list(digests))",
            "context.device.type)",
            "tests/initializers/i2l/test_initializer.py::test_what_was_predicted_from_other_pictures_is_not_read",
        ),
        (
            "predictions of another Qwen-VL are read from the cache",
            "read_by += _reader(context)",
            "pass",
            "tests/initializers/i2l/test_initializer.py::test_what_another_file_predicted_is_not_read",
        ),
        (
            "embeddings of another encoder are read from the cache",
            '"i2l embedding", model, ',
            '"i2l embedding", ',
            "tests/initializers/i2l/test_initializer.py::test_kept_embeddings_are_of_the_encoders_that_are_there_now",
        ),
        (
            "hidden states at another resolution are read from the cache",
            "model, device, resolution, digest)",
            "model, device, digest)",
            "tests/initializers/i2l/test_initializer.py::test_kept_hidden_states_are_of_the_resolution_that_is_asked_for",
        ),
        (
            "a seed of some pictures is one of all",
            "factor[self._pictures]",
            "factor",
            "tests/initializers/i2l/test_expert.py::test_some_pictures_combined_are_as_if_the_others_were_not_there",
        ),
        (
            "the weight of Bias is ignored",
            'self._weights.get("bias", 1.0)',
            "1.0",
            "tests/initializers/i2l/test_initializer.py::test_weights_of_the_experts",
        ),
        (
            "the order of ranks depends on what was predicted before",
            "for kind in ORDER if kind in by_picture",
            "for kind in by_picture",
            "tests/initializers/i2l/test_initializer.py::test_ranks_are_in_the_published_order_whatever_was_predicted_before",
        ),
        (
            "NaN in an embedding goes on",
            "if not bool(row.isfinite().all())",
            "if False",
            "tests/initializers/i2l/test_initializer.py::test_a_picture_that_encoders_cannot_read_is_named",
        ),
        (
            "the text encoder stays beside the image encoders",
            "context.text_encoder.unload()",
            "pass",
            "tests/initializers/i2l/test_initializer.py::test_the_text_encoder_is_gone_before_the_image_encoders_come",
        ),
    ),
    *_mutants(
        "initializers/i2l/initializer.py",
        (
            "strength is tried on other pictures than those that were chosen",
            "indices[index], sigmas)",
            "index, sigmas)",
            "tests/initializers/i2l/test_initializer.py::test_strength_is_tried_on_the_pictures_that_were_chosen",
        ),
        (
            "strength is tried without the experts' weights",
            "whole = dict(predictions.combine(config.expert_weights, others))",
            "whole = dict(predictions.combine({}, others))",
            "tests/initializers/i2l/test_initializer.py::test_strength_is_tried_on_the_pictures_that_were_chosen",
        ),
        (
            "strength is tried on pictures that the seed has seen",
            "if other != index",
            "if True",
            "tests/initializers/i2l/test_initializer.py::test_strength_is_chosen_by_what_the_others_seed_does_to_a_picture",
        ),
        (
            "the strength with the highest loss is taken",
            "np.argmin(losses)",
            "np.argmax(losses)",
            "tests/initializers/i2l/test_initializer.py::test_the_minimum_of_a_parabola",
        ),
        (
            "each picture is tried at all sigmas",
            "range(place, NUM_SIGMAS, len(tried))",
            "range(NUM_SIGMAS)",
            "tests/initializers/i2l/test_initializer.py::test_strength_is_chosen_by_what_the_others_seed_does_to_a_picture",
        ),
        (
            "merge forgets the strength",
            "range(len(paths)), strength)",
            'range(len(paths)), 1.0 if config.mode == "merge" else strength)',
            "tests/initializers/i2l/test_initializer.py::test_merge_keeps_the_whole_prediction_at_its_strength",
        ),
        (
            "the rank for an energy is that of modules that are not trained",
            "for name in factors if name in context.modules",
            "for name in factors",
            "tests/initializers/i2l/test_initializer.py::test_the_rank_for_an_energy_is_that_of_the_modules_that_are_trained",
        ),
        (
            "a number of pictures is the first ones",
            "index * count // chosen",
            "index",
            "tests/initializers/i2l/test_initializer.py::test_a_number_of_pictures_is_spread_over_all",
        ),
        (
            "other encoders are the same initializer",
            ", *encoders.identity(config.encoders)]",
            "]",
            "tests/initializers/i2l/test_initializer.py::test_the_identity_tells_experts_and_encoders_apart",
        ),
    ),
    *_mutants(
        "initializers/i2l/expert.py",
        (
            "predictions of several pictures are added up",
            "joined / count if count > 1 else joined",
            "joined",
            "tests/initializers/i2l/test_expert.py::test_the_mean_of_each_sample_s_pictures",
        ),
        (
            "the residual does not reach the prediction",
            "compressed + shift",
            "compressed",
            "tests/initializers/i2l/test_expert.py::test_forward",
        ),
        (
            "the last rows of a weight are not read",
            "min(at_once, num_rows - start)",
            "min(at_once, num_rows - start - 1)",
            "tests/initializers/i2l/test_expert.py::test_streaming_is_the_module_and_the_reference",
        ),
    ),
    *_mutants(
        "initializers/i2l/encoders.py",
        (
            "the residual is ten times as large",
            "RESIDUAL_SCALE = 0.05",
            "RESIDUAL_SCALE = 0.5",
            "tests/initializers/i2l/test_encoders.py::test_residual_is_what_the_edit_pipeline_sees[224-71]",
        ),
        (
            "DINOv3's embedding is the mean of its tokens",
            "last_hidden_state[:, 0]",
            "last_hidden_state.mean(1)",
            "tests/initializers/i2l/test_encoders.py::test_embeddings_are_siglip_then_dinov3",
        ),
        (
            "pictures are squeezed into the square",
            "size / min(picture.size)",
            "size / max(picture.size)",
            "tests/initializers/i2l/test_encoders.py::test_cover_crop_keeps_the_middle",
        ),
        (
            "the tokens of a picture are placed like text",
            "[1] * num_image_tokens",
            "[0] * num_image_tokens",
            "tests/initializers/i2l/test_encoders.py::test_residual_is_what_the_edit_pipeline_sees[224-71]",
        ),
    ),
)


# --- the program ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    dead: bool
    said: str


def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT, mutants: Sequence[Mutant] = MUTANTS) -> int:
    """Exit code 0 if every mutant is dead."""
    options = parse_arguments(arguments)
    wanted = re.compile(options.only, re.IGNORECASE)
    chosen = [mutant for mutant in mutants if wanted.search(f"{mutant.file}: {mutant.name}")]
    if options.list or not chosen:
        print("\n".join(f"{mutant.file}: {mutant.name}" for mutant in chosen) or "no mutant has such a name or file")
        return 0 if chosen else 1
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = copy_tracked(root, Path(folder).resolve() / "copy")
        tests = dict.fromkeys(test for mutant in chosen for test in mutant.tests)
        print(f"{len(tests)} tests without a mutant ...", flush=True)
        code, output = run_tests(copy, tests, TIMEOUT * len(chosen))
        if code != PASSED:
            print(f"{output}\nThese tests are red without a mutant: nothing can be told before they are green.")
            return 1
        verdicts = [tell(mutant, judge(copy, mutant)) for mutant in tqdm(chosen, "mutants", unit="")]
    dead = sum(verdict.dead for verdict in verdicts)
    print(f"{dead} of {len(chosen)} mutants are dead, in {time.monotonic() - began:.0f} s")
    return 0 if dead == len(chosen) else 1


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="See whether the tests notice.")
    parser.add_argument("--only", default="", metavar="PATTERN", help="mutants whose file or name matches (a regex)")
    parser.add_argument("--list", action="store_true", help="print their files and names, and stop")
    return parser.parse_args(arguments)


def copy_tracked(root: Path, copy: Path) -> Path:
    """The tracked files as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, copy / name)
    return copy


def judge(copy: Path, mutant: Mutant) -> Verdict:
    """Apply the mutant, run its tests, put the file back."""
    path = copy / mutant.file
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(mutant.applied(text), encoding="utf-8")
        code, output = run_tests(copy, mutant.tests, TIMEOUT)
    except DoesNotApply as error:
        return Verdict(False, f"does not apply: {error}")
    finally:
        path.write_text(text, encoding="utf-8")
    if code is None:
        return Verdict(False, f"no answer within {TIMEOUT:.0f} s")
    if code == PASSED:
        return Verdict(False, "LIVED")
    killers = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    if code == FAILED and killers:
        return Verdict(True, f"killed by {killers[0]}")
    return Verdict(False, f"its tests could not be run:\n{output}")


def run_tests(copy: Path, tests: Iterable[str], timeout: float) -> tuple[int | None, str]:
    """The exit code of pytest, or None after `timeout` seconds; and its output, up to the first failure."""
    context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    output = copy.with_name("output.txt")
    process = context.Process(target=_run_pytest, args=(copy, [*tests], output))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return None, ""
    return process.exitcode, output.read_text(encoding="utf-8")


def _run_pytest(copy: Path, tests: list[str], output: Path) -> None:
    """In a process that has imported nothing of ours."""
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    gc.freeze()  # pytest collects garbage: what was imported before need not be looked through
    sys.dont_write_bytecode = True  # of a mutant of the same size and second, that of another would be taken
    options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", f"--basetemp={copy.with_name('tmp')}"]
    with output.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        code = pytest.main([*options, *tests])
    sys.exit(code)


def tell(mutant: Mutant, verdict: Verdict) -> Verdict:
    tqdm.write(f"{mutant.file}: {mutant.name}: {verdict.said}", file=sys.stdout)
    return verdict


if __name__ == "__main__":
    sys.exit(main())
