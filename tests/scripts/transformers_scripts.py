"""The example scripts of transformers, shortened to what meets the Trainer.

Each prepares its data, its collator and its metrics as the script of that name does; models are
tiny and random, data are made up.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    default_data_collator,
)

from tests.helpers.models import SIZE
from tests.scripts.world import VOCABULARY, Script, plain, quiet, seeded, sentences, tokenizer

ROWS = 12


def bert(cls: Any, seed: int = 0, **config: Any) -> Any:
    """A two-layer BERT with a head."""
    return seeded(lambda: cls(BertConfig(vocab_size=VOCABULARY, **SIZE, **config)), seed)


# ---- text classification ----


def _pairs(low: int, labels: list[Any] | None) -> datasets.Dataset:
    """Rows as GLUE has them: two sentences, an index, a label."""
    rows = {
        "sentence1": sentences(ROWS, low),
        "sentence2": sentences(ROWS, low + 3),
        "idx": list(range(ROWS)),
    }
    return datasets.Dataset.from_dict(rows if labels is None else {**rows, "label": labels})


def _glue(folder: Path, labels: list[Any], metric: Any, **config: Any) -> Script:
    tokens = tokenizer()

    def preprocess(examples: Any) -> Any:
        return tokens(examples["sentence1"], examples["sentence2"], truncation=True, max_length=32)

    train = _pairs(0, labels).map(preprocess, batched=True)
    target = _pairs(30, None).map(preprocess, batched=True)
    trainer = Trainer(
        model=bert(BertForSequenceClassification, **config),
        args=TrainingArguments(**quiet(folder)),
        train_dataset=train,
        eval_dataset=train.select(range(4)),
        compute_metrics=metric,
        processing_class=tokens,
        data_collator=DataCollatorWithPadding(tokens, pad_to_multiple_of=8),
    )
    return Script(
        trainer,
        target,
        bert(BertForSequenceClassification, seed=1, **config),
        plain(BertForSequenceClassification),
        ("sentence1", "sentence2"),
    )


def run_glue(folder: Path) -> Script:
    """Pairs of sentences in three classes, as MNLI."""
    labels = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])

    def metric(p: Any) -> dict[str, float]:
        predicted = np.argmax(p.predictions, axis=1)
        return {"accuracy": float((predicted == p.label_ids).mean())}

    names = dict(enumerate(labels.names))
    return _glue(folder, [i % 3 for i in range(ROWS)], metric, num_labels=3, id2label=names)


def run_glue_regression(folder: Path) -> Script:
    """Pairs with a score, as STS-B: one output, the problem type is left to the model."""

    def metric(p: Any) -> dict[str, float]:
        return {"mse": float(((np.squeeze(p.predictions) - p.label_ids) ** 2).mean())}

    return _glue(folder, [(i % 5) / 1.0 + 0.5 for i in range(ROWS)], metric, num_labels=1)


def run_classification(folder: Path) -> Script:
    """Texts with several labels each."""
    tokens = tokenizer()

    def rows(low: int, labels: bool) -> datasets.Dataset:
        made: dict[str, Any] = {"text": sentences(ROWS, low)}
        if labels:
            made["label"] = [[float(i % 2), 1.0, float(i % 3 == 0)] for i in range(ROWS)]

        def preprocess(examples: Any) -> Any:
            return tokens(examples["text"], padding="max_length", max_length=16, truncation=True)

        return datasets.Dataset.from_dict(made).map(preprocess, batched=True)

    def metric(p: Any) -> dict[str, float]:
        predicted = np.where(p.predictions > 0, 1, 0)
        return {"exact": float((predicted == p.label_ids).all(1).mean())}

    config = dict(num_labels=3, problem_type="multi_label_classification")
    train = rows(0, labels=True)
    trainer = Trainer(
        model=bert(BertForSequenceClassification, **config),
        args=TrainingArguments(**quiet(folder)),
        train_dataset=train,
        eval_dataset=train.select(range(4)),
        compute_metrics=metric,
        processing_class=tokens,
        data_collator=default_data_collator,
    )
    return Script(
        trainer,
        rows(30, labels=False),
        bert(BertForSequenceClassification, seed=1, **config),
        plain(BertForSequenceClassification),
    )


# ---- tokens, spans, choices ----


def run_ner(folder: Path) -> Script:
    """Words with tags; special tokens are labelled -100."""
    tokens = tokenizer()

    def rows(low: int, labels: bool) -> datasets.Dataset:
        texts = [text.split() for text in sentences(ROWS, low)]
        made: dict[str, Any] = {"tokens": texts}
        if labels:
            made["ner_tags"] = [[j % 3 for j in range(len(text))] for text in texts]

        def align(examples: Any) -> Any:
            encoded = tokens(examples["tokens"], truncation=True, is_split_into_words=True)
            if labels:
                encoded["labels"] = [
                    [-100 if word is None else tags[word] for word in encoded.word_ids(i)]
                    for i, tags in enumerate(examples["ner_tags"])
                ]
            return encoded

        return datasets.Dataset.from_dict(made).map(align, batched=True)

    def metric(p: Any) -> dict[str, float]:
        real = p.label_ids != -100
        return {"accuracy": float((np.argmax(p.predictions, 2) == p.label_ids)[real].mean())}

    train = rows(0, labels=True)
    trainer = Trainer(
        model=bert(BertForTokenClassification, num_labels=3),
        args=TrainingArguments(**quiet(folder)),
        train_dataset=train,
        eval_dataset=train.select(range(4)),
        processing_class=tokens,
        data_collator=DataCollatorForTokenClassification(tokens),
        compute_metrics=metric,
    )
    return Script(
        trainer,
        rows(30, labels=False),
        bert(BertForTokenClassification, seed=1, num_labels=3),
        plain(BertForTokenClassification),
        "tokens",
    )


class QuestionAnsweringTrainer(Trainer):
    """Evaluates on features, whose predictions are put together by example."""

    def __init__(self, *args: Any, eval_examples: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The script's own loop, without the loss."""
        loader = self.get_eval_dataloader(self.eval_dataset)
        compute, self.compute_metrics = self.compute_metrics, None
        try:
            output = self.evaluation_loop(loader, "Evaluation", prediction_loss_only=False)
        finally:
            self.compute_metrics = compute
        starts, ends = output.predictions[:2]
        metrics = {"eval_examples": float(len(self.eval_examples)), "eval_shift": 0.0}
        metrics["eval_shift"] = float((np.argmax(ends, 1) - np.argmax(starts, 1)).mean())
        self.log(metrics)
        return metrics


def run_qa(folder: Path) -> Script:
    """Questions about a context, in features of a window each."""
    tokens = tokenizer()

    def rows(low: int, labels: bool) -> tuple[datasets.Dataset, datasets.Dataset]:
        examples = datasets.Dataset.from_dict(
            {"question": sentences(ROWS, low), "context": sentences(ROWS, low + 5)}
        )

        def prepare(batch: Any) -> Any:
            encoded = tokens(
                batch["question"],
                batch["context"],
                truncation="only_second",
                max_length=16,
                stride=2,
                return_overflowing_tokens=True,
                padding="max_length",
            )
            encoded.pop("overflow_to_sample_mapping")
            if labels:
                encoded["start_positions"] = [1 + i % 3 for i in range(len(encoded["input_ids"]))]
                encoded["end_positions"] = [2 + i % 3 for i in range(len(encoded["input_ids"]))]
            return encoded

        return examples, examples.map(prepare, batched=True, remove_columns=examples.column_names)

    examples, train = rows(0, labels=True)
    trainer = QuestionAnsweringTrainer(
        model=bert(BertForQuestionAnswering),
        args=TrainingArguments(**quiet(folder)),
        train_dataset=train,
        eval_dataset=train.remove_columns(["start_positions", "end_positions"]).select(range(4)),
        eval_examples=examples,
        processing_class=tokens,
        data_collator=default_data_collator,
        compute_metrics=lambda p: {},
    )
    return Script(
        trainer,
        rows(30, labels=False)[1],
        bert(BertForQuestionAnswering, seed=1),
        plain(BertForQuestionAnswering),
    )


def run_swag(folder: Path) -> Script:
    """A beginning with four endings, flattened for the tokenizer and folded again."""
    tokens = tokenizer()
    endings = [f"ending{i}" for i in range(4)]

    def rows(low: int, labels: bool) -> datasets.Dataset:
        made: dict[str, Any] = {"sent1": sentences(ROWS, low), "sent2": sentences(ROWS, low + 1)}
        made.update({name: sentences(ROWS, low + i) for i, name in enumerate(endings)})
        if labels:
            made["label"] = [i % 4 for i in range(ROWS)]

        def preprocess(batch: Any) -> Any:
            first = list(chain(*[[context] * 4 for context in batch["sent1"]]))
            second = [
                f"{header} {batch[end][i]}"
                for i, header in enumerate(batch["sent2"])
                for end in endings
            ]
            encoded = tokens(first, second, truncation=True, max_length=24)
            return {k: [v[i : i + 4] for i in range(0, len(v), 4)] for k, v in encoded.items()}

        return datasets.Dataset.from_dict(made).map(preprocess, batched=True)

    def metric(p: Any) -> dict[str, float]:
        return {"accuracy": float((np.argmax(p.predictions, 1) == p.label_ids).mean())}

    train = rows(0, labels=True)
    trainer = Trainer(
        model=bert(BertForMultipleChoice),
        args=TrainingArguments(**quiet(folder)),
        train_dataset=train,
        eval_dataset=train.select(range(4)),
        processing_class=tokens,
        data_collator=DataCollatorForMultipleChoice(tokenizer=tokens),
        compute_metrics=metric,
    )
    return Script(
        trainer,
        rows(30, labels=False),
        bert(BertForMultipleChoice, seed=1),
        plain(BertForMultipleChoice),
        ("sent1", "sent2"),
    )


# ---- language models ----


def _blocks(tokens: Any, low: int, block: int) -> datasets.Dataset:
    """All texts in one row after another of `block` tokens."""
    raw = datasets.Dataset.from_dict({"text": sentences(3 * ROWS, low)})
    encoded = raw.map(
        lambda batch: tokens(batch["text"]), batched=True, remove_columns=raw.column_names
    )

    def group(batch: Any) -> Any:
        joined = {key: list(chain(*batch[key])) for key in batch}
        length = len(joined["input_ids"]) // block * block
        made = {k: [v[i : i + block] for i in range(0, length, block)] for k, v in joined.items()}
        made["labels"] = [list(row) for row in made["input_ids"]]
        return made

    return encoded.map(group, batched=True)


def _token_accuracy(p: Any) -> dict[str, float]:
    predicted, labels = p.predictions[:, :-1].reshape(-1), p.label_ids[:, 1:].reshape(-1)
    return {"accuracy": float((predicted == labels)[labels != -100].mean())}


def _argmax(logits: Any, labels: Any) -> torch.Tensor:
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(dim=-1)


def run_clm(folder: Path) -> Script:
    """Blocks of running text for a causal language model."""
    tokens = tokenizer(causal=True)

    def model(seed: int) -> Any:
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2,
            bos_token_id=2, eos_token_id=3,
        )  # fmt: skip
        return seeded(lambda: GPT2LMHeadModel(config), seed)

    train = _blocks(tokens, 0, 12)
    trainer = Trainer(
        model=model(0),
        args=TrainingArguments(**quiet(folder)),
        train_dataset=train,
        eval_dataset=train.select(range(4)),
        processing_class=tokens,
        data_collator=default_data_collator,
        compute_metrics=_token_accuracy,
        preprocess_logits_for_metrics=_argmax,
    )
    return Script(trainer, _blocks(tokens, 30, 12), model(1), plain(GPT2LMHeadModel))


def run_mlm(folder: Path) -> Script:
    """Blocks of running text, masked anew in each batch."""
    tokens = tokenizer()
    train = _blocks(tokens, 0, 12).remove_columns("labels")
    trainer = Trainer(
        model=bert(BertForMaskedLM),
        args=TrainingArguments(**quiet(folder)),
        train_dataset=train,
        eval_dataset=train.select(range(4)),
        processing_class=tokens,
        data_collator=DataCollatorForLanguageModeling(tokens, mlm_probability=0.3),
        compute_metrics=_token_accuracy,
        preprocess_logits_for_metrics=_argmax,
    )
    target = _blocks(tokens, 30, 12).remove_columns("labels")
    return Script(trainer, target, bert(BertForMaskedLM, seed=1), plain(BertForMaskedLM))


# ---- sequence to sequence ----


def _seq2seq(folder: Path, make: Any, cls: Any, columns: Any, length: int | None) -> Script:
    tokens = tokenizer()

    def rows(low: int) -> datasets.Dataset:
        inputs, outputs = columns(low)
        raw = datasets.Dataset.from_dict({"text": inputs, "summary": outputs})

        def preprocess(batch: Any) -> Any:
            encoded = tokens(batch["text"], max_length=16, truncation=True)
            encoded["labels"] = tokens(text_target=batch["summary"], max_length=8, truncation=True)[
                "input_ids"
            ]
            return encoded

        return raw.map(preprocess, batched=True, remove_columns=raw.column_names)

    def metric(p: Any) -> dict[str, float]:
        predictions = p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions
        predictions = np.where(predictions != -100, predictions, tokens.pad_token_id)
        decoded = tokens.batch_decode(predictions, skip_special_tokens=True)
        return {"gen_len": float(np.mean([len(text.split()) for text in decoded]))}

    model = make(0)
    train = rows(0)
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            **quiet(folder, predict_with_generate=True, generation_max_length=length)
        ),
        train_dataset=train,
        eval_dataset=train.select(range(4)),
        processing_class=tokens,
        data_collator=DataCollatorForSeq2Seq(tokens, model=model, label_pad_token_id=-100),
        compute_metrics=metric,
    )
    return Script(trainer, rows(30), make(1), plain(cls))


def run_summarization(folder: Path) -> Script:
    """T5 with a prefix."""

    def make(seed: int) -> Any:
        config = T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2,
            decoder_start_token_id=0, eos_token_id=3,
        )  # fmt: skip
        return seeded(lambda: T5ForConditionalGeneration(config), seed)

    def columns(low: int) -> Any:
        texts = sentences(ROWS, low)
        return ["w1 " + text for text in texts], [" ".join(t.split()[:2]) for t in texts]

    return _seq2seq(folder, make, T5ForConditionalGeneration, columns, 6)


def run_translation(folder: Path) -> Script:
    """BART, which makes the decoder's inputs of the labels in the collator."""

    def make(seed: int) -> Any:
        config = BartConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
            decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=0, bos_token_id=2,
            eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3,
        )  # fmt: skip
        return seeded(lambda: BartForConditionalGeneration(config), seed)

    def columns(low: int) -> Any:
        return sentences(ROWS, low), sentences(ROWS, 10)

    return _seq2seq(folder, make, BartForConditionalGeneration, columns, 6)


# ---- images and sound ----


def run_image_classification(folder: Path) -> Script:
    """Images that a transform makes on the fly; the script keeps unused columns for it."""

    def rows(shift: float, labels: bool) -> datasets.Dataset:
        generator = np.random.default_rng(0)
        images = generator.normal(shift, 1.0, (ROWS, 3, 8, 8)).astype(np.float32)
        made: dict[str, Any] = {"image": images.tolist()}
        if labels:
            made["labels"] = [i % 3 for i in range(ROWS)]

        def transforms(batch: Any) -> Any:
            batch["pixel_values"] = [torch.tensor(image) / 2 for image in batch.pop("image")]
            return batch

        made_set = datasets.Dataset.from_dict(made)
        made_set.set_transform(transforms)
        return made_set

    def collate_fn(examples: Any) -> dict[str, torch.Tensor]:
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        labels = torch.tensor([example["labels"] for example in examples])
        return {"pixel_values": pixel_values, "labels": labels}

    def model(seed: int) -> Any:
        config = ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZE)
        return seeded(lambda: ViTForImageClassification(config), seed)

    def metric(p: Any) -> dict[str, float]:
        return {"accuracy": float((np.argmax(p.predictions, 1) == p.label_ids).mean())}

    train = rows(0.0, labels=True)
    trainer = Trainer(
        model=model(0),
        args=TrainingArguments(**quiet(folder, remove_unused_columns=False)),
        train_dataset=train,
        eval_dataset=rows(0.5, labels=True),
        compute_metrics=metric,
        data_collator=collate_fn,
    )
    target = rows(1.0, labels=False)
    return Script(trainer, target, model(1), plain(ViTForImageClassification))


def run_audio_classification(folder: Path) -> Script:
    """Sound that a transform cuts on the fly; the script keeps unused columns for it."""
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True, sampling_rate=16000)

    def rows(shift: float, labels: bool) -> datasets.Dataset:
        generator = np.random.default_rng(0)
        made: dict[str, Any] = {
            "audio": generator.normal(shift, 1.0, (ROWS, 400)).astype(np.float32).tolist()
        }
        if labels:
            made["label"] = [i % 3 for i in range(ROWS)]

        def transforms(batch: Any) -> Any:
            waves = [np.asarray(wave)[:320] for wave in batch["audio"]]
            inputs = extractor(waves, sampling_rate=16000)
            made = {"input_values": inputs["input_values"]}
            if "label" in batch:
                made["labels"] = list(batch["label"])
            return made

        made_set = datasets.Dataset.from_dict(made)
        made_set.set_transform(transforms, output_all_columns=False)
        return made_set

    def model(seed: int) -> Any:
        config = Wav2Vec2Config(
            vocab_size=32, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8),
            num_feat_extract_layers=2, num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, num_labels=3, classifier_proj_size=8,
            mask_time_length=2, layerdrop=0.0, **SIZE,
        )  # fmt: skip
        made = seeded(lambda: Wav2Vec2ForSequenceClassification(config), seed)
        made.freeze_feature_encoder()
        return made

    def metric(p: Any) -> dict[str, float]:
        return {"accuracy": float((np.argmax(p.predictions, 1) == p.label_ids).mean())}

    trainer = Trainer(
        model=model(0),
        args=TrainingArguments(**quiet(folder, remove_unused_columns=False)),
        train_dataset=rows(0.0, labels=True),
        eval_dataset=rows(0.5, labels=True),
        compute_metrics=metric,
        processing_class=extractor,
    )
    target = rows(1.0, labels=False)
    return Script(trainer, target, model(1), plain(Wav2Vec2ForSequenceClassification))
