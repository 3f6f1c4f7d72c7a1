"""What is taught about every place of a scene is what was drawn there."""

import pytest
import torch

from florence2.inputs.coordinates import bins_to_pixels
from florence2.model.florence2 import IGNORED_LABEL
from florence2.train.loss import LossModule
from recipes.nano.places import QUESTIONS, PlacesLoss, SceneBatch, look, make_scene_batch
from recipes.nano.scenes import make_scene
from recipes.nano.train import SceneSamples, first_location, make_model, nano_config

NAMES = list(QUESTIONS)


@pytest.fixture(scope="module")
def objective(processor) -> PlacesLoss:
    torch.manual_seed(0)
    model = make_model(nano_config(processor.tokenizer.vocab_size), processor, seed=0)
    return PlacesLoss(model, first_location(processor))


@pytest.fixture(scope="module")
def batch(processor) -> SceneBatch:
    samples = SceneSamples(5, 3, questions=2)
    return make_scene_batch([samples[i] for i in range(3)], processor, 200, grid=4)


def test_a_place_says_what_is_drawn_there() -> None:
    for index in range(20):
        scene, grid = make_scene(9, index), 12
        answers, corners = (values.unflatten(0, (grid, grid)) for values in look(scene, grid))
        width, height = scene.image.size
        for thing in scene.things:
            left, top, right, bottom = thing.box
            place = int((top + bottom) / 2 / height * grid), int((left + right) / 2 / width * grid)
            said = {name: QUESTIONS[name][answers[place][i]] for i, name in enumerate(NAMES)}
            assert said["category"] == thing.category and said["color"] == thing.color
            assert said["size"] == thing.size and said["texture"] == thing.texture
            assert said["background"] == scene.background
            assert "".join(said[f"character {n}"] for n in range(4)) == thing.text
            assert bins_to_pixels(corners[place][:4].tolist(), scene.image.size) == pytest.approx(thing.box, abs=0.2)


def test_where_nothing_is_only_that_is_asked() -> None:
    scene = make_scene(9, 0, most_things=1)
    answers, corners = look(scene, 12)
    empty = answers[:, 1] == 0
    share = 1 - empty.double().mean().item()
    left, top, right, bottom = scene.things[0].box
    width, height = scene.image.size
    assert share == pytest.approx((right - left) * (bottom - top) / width / height, abs=0.03)
    assert (answers[empty, 2] == 0).all() and (answers[empty, 3:] == IGNORED_LABEL).all()
    assert (corners[empty] == IGNORED_LABEL).all() and (corners[~empty] >= 0).all()


def test_what_does_not_speak_leaves_the_decoder_alone(objective, batch) -> None:
    objective.zero_grad()
    objective.speaks = False
    objective(batch).backward()
    model = objective.model
    assert all(parameter.grad is None for parameter in model.language_model.decoder.parameters())
    assert all(parameter.grad is not None for parameter in model.language_model.encoder.layers.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in objective.corners.parameters())


def test_speaking_adds_the_loss_of_the_answers(objective, batch) -> None:
    with torch.no_grad():
        objective.eval()
        objective.speaks = False
        seen = objective(batch)
        objective.speaks = True
        both = objective(batch)
        answers = LossModule(objective.model)(batch)
    # the prompts of the first questions are padded by what the second ones need, which is masked
    assert both.item() == pytest.approx((seen + answers).item(), rel=1e-5)


def test_the_loss_of_places_is_that_of_their_answers(objective, batch) -> None:
    """With readers that always say the same, by hand."""
    places = torch.zeros(3, 16, objective.model.config.text.d_model)
    with torch.no_grad():
        for reader in (*objective.readers, objective.corners):
            reader.bias.zero_()
        category = objective.readers[NAMES.index("category")]
        category.bias[0] = 3.0
        loss = objective.places_loss(places, batch).item()
    wanted = 0.0
    for number, (name, words) in enumerate(QUESTIONS.items()):
        logits = torch.zeros(len(words))
        logits[0] = 3.0 if name == "category" else 0.0
        answers = batch.answers[..., number]
        wanted -= logits.log_softmax(0)[answers[answers != IGNORED_LABEL]].mean().item()
    wanted += 3.0 * torch.log(torch.tensor(1000.0)).item()
    assert loss == pytest.approx(wanted, rel=1e-5)
