"""What the explorer answers: the numbers of the command-line tools, and no more than it should."""

import base64
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from malformed_data import rotated
from mini_models import build, import_library, mini_classifier, mini_detector
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from mmsoft import visualization
from mmsoft.analysis import (
    attention_usage,
    capture,
    load_image,
    load_model,
)
from mmsoft.analysis.inference import inference_pipeline

looking = pytest.importorskip("mmsoft.explore.looking")
server = pytest.importorskip("mmsoft.explore.server")
Settings, View = looking.Settings, looking.View
IMAGE = "000000000001.jpg"
BOTH = pytest.mark.parametrize("config_path", ["released", "content"], indirect=True)
HERE = dict(image=IMAGE, stage=1, block=0, x=20, y=30)


def ask(client, path, **query):
    answer = client.get(f"/api/{path}", query_string={**HERE, **query})
    assert answer.status_code == 200, answer.json
    return answer.json


def array(packed):
    raw = np.frombuffer(base64.b64decode(packed["bytes"]), packed["dtype"])
    return raw.reshape(packed["shape"])


def png(width=40, height=30, seed=0):
    from PIL import Image

    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_the_page_needs_nothing_from_elsewhere(client):
    for name in ("/", "/static/app.js", "/static/style.css"):
        answer = client.get(name)
        assert answer.status_code == 200
        assert "://" not in answer.text
    assert "default-src 'self'" in client.get("/").headers["Content-Security-Policy"]


def test_what_there_is(client):
    about = client.get("/api/about").json
    assert about["images"] == [IMAGE, "000000000002.jpg"]
    assert about["blocks"][:2] == [
        dict(stage=0, block=0, heads=1),
        dict(stage=1, block=0, heads=2),
    ]
    assert (about["budget"], about["solver"]) == (None, "newton")
    assert len(about["viridis"]) == 256


@BOTH
@pytest.mark.parametrize("head", [-1, 1])
def test_maps_are_those_of_the_command_line(
    client, monkeypatch, root, workplace, images, run_tool, head
):
    """The arrays that visualize_attention.py draws."""
    drawn = []
    draw = visualization.draw_attention
    monkeypatch.setattr(
        visualization, "draw_attention", lambda *a, **k: drawn.append(a) or draw(*a, **k)
    )
    monkeypatch.chdir(workplace)
    config = root / "configs/demo/retinanet_softpp-mini_fpn_shapes.py"
    options = ["--query", "20,30", "--stage", 1, "--compare", "softmax"]
    status, out, _ = run_tool(
        "analysis_tools/visualize_attention.py", config, images / IMAGE, "model.pth", *options
    )
    assert status == 0
    _, _, maps, extent = drawn[0]
    found = ask(client, "attention", head=head)
    rows, softmax = array(found["rows"]), array(found["softmax"])
    for ours, name in zip(rows, ("SOFT++, head 0", "SOFT++, head 1")):
        expected = maps[name][0].ravel()
        assert np.abs(ours - expected).max() <= 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(softmax.mean(0), maps["softmax"][0].ravel(), rtol=1e-6)
    assert found["extent"] == list(extent)
    ranks = ask(client, "usage", head=head)["rank"]
    assert [f"effective rank {rank:.2f}" in out for rank in ranks] == [True, True]


@BOTH
def test_landmarks_and_spectrum_are_those_of_the_command_line(
    client, config_path, monkeypatch, workplace, images, run_tool
):
    """The arrays that visualize_landmarks.py draws."""
    drawn = {}
    for name in ("draw_landmarks", "draw_spectrum"):
        draw = getattr(visualization, name)

        def record(*args, name=name, draw=draw, **options):
            drawn[name] = args
            return draw(*args, **options)

        monkeypatch.setattr(visualization, name, record)
    monkeypatch.chdir(workplace)
    options = ["--stage", 1, "--head", 1]
    status, *_ = run_tool(
        "analysis_tools/visualize_landmarks.py", config_path, images / IMAGE, "model.pth", *options
    )
    assert status == 0
    _, *expected, extent = drawn["draw_landmarks"]
    found = ask(client, "landmarks", head=1)
    for name, values in zip(("regions", "strength", "centres"), expected, strict=True):
        np.testing.assert_allclose(array(found[name]), values, rtol=1e-6)
    assert found["extent"] == list(extent)
    if "draw_spectrum" not in drawn:  # of landmarks by content
        answer = client.get("/api/spectrum", query_string=HERE)
        assert answer.status_code == 400
        assert "no inverse" in answer.json["error"]
        return
    found = ask(client, "spectrum")
    names = ("eigenvalues", "x", "filters")
    for name, values in zip(names, drawn["draw_spectrum"], strict=True):
        values = np.asarray(values)
        np.testing.assert_allclose(array(found[name]), values, rtol=1e-5, atol=1e-7 * values.max())


@pytest.mark.parametrize(
    ("config_path", "budget", "solver"),
    [
        ("released", "4", "newton"),
        ("released", "all", "direct"),
        ("released", "own", "newton"),
        ("content", "4", "newton"),
        ("content", "own", "newton"),
    ],
    indirect=["config_path"],
)
def test_settings_are_those_of_a_config_with_them(
    client, config_path, images, workplace, budget, solver
):
    def run(**settings):
        """A model of its own: the layer, the pixel's row, the last features."""
        config = Config.fromfile(config_path)
        config.model.backbone.update(settings)
        model = load_model(config, str(workplace / "model.pth"))
        image = load_image(config, model, str(images / IMAGE))
        with torch.no_grad(), capture(model) as states:
            features = model.backbone(image.inputs)[-1]
        state = states[1, 0]
        row = state.attention_rows([image.token_at(20, 30, state.hw_shape)])[0, :, 0]
        return state, row.numpy(), features.numpy()

    settings = dict(solver=solver)
    if budget != "own":
        settings["max_landmarks"] = None if budget == "all" else int(budget)
    state, expected, features = run(**settings)
    found = ask(client, "attention", budget=budget, solver=solver)
    assert np.abs(array(found["rows"]) - expected).max() <= 1e-6 * np.abs(expected).max()
    count = [state.landmarks.shape[2]] * 2
    if state.layer.by_content:
        count = state.present[0].sum(-1).tolist()
        assert max(count) == (4 if budget == "4" else max(count)) > 1
    assert found["landmarks"] == count
    changed = found["changed"]
    assert (changed is None) == (budget == "own")
    if changed:
        _, own_row, own_features = run()
        for name, now, own in (("row", expected, own_row), ("features", features, own_features)):
            share = np.linalg.norm(now - own) / np.linalg.norm(own)
            assert share > 1e-5
            assert changed[name] == pytest.approx(share, rel=1e-3)
    usage = attention_usage(state)
    assert ask(client, "usage", budget=budget, solver=solver)["rank"] == pytest.approx(
        usage.rank.tolist(), rel=1e-6
    )


@pytest.mark.parametrize("config_path", ["content"], indirect=True)
def test_without_an_inverse_there_is_no_solver(client, explorer, monkeypatch):
    """A link that names another one shows the model's own layers, not those of a second run."""
    expected = ask(client, "attention")
    monkeypatch.setattr(explorer, "_capture", None)
    found = ask(client, "attention", solver="direct")
    assert found == expected
    assert found["changed"] is None


@BOTH
@pytest.mark.parametrize("budget", ["own", "16"])
def test_regions_are_of_the_landmarks_that_there_are(client, explorer, budget):
    settings = Settings(explorer.own.budget if budget == "own" else 16, explorer.own.solver)
    state = explorer.captured(IMAGE, settings).states[1, 0]
    kernel = (-0.5 * torch.cdist(state.q[0, 1].double(), state.landmarks[0, 1].double()) ** 2).exp()
    if state.present is not None:
        assert not state.present[0].all(), "nothing is left out"
        kernel = kernel[:, state.present[0, 1]]
    found = ask(client, "landmarks", head=1, budget=budget)
    regions, strength = (array(found[name]).ravel() for name in ("regions", "strength"))
    expected, where = kernel.max(-1)
    np.testing.assert_allclose(strength, expected, rtol=1e-6, atol=1e-12)
    assert (regions == where.numpy()).mean() > 0.99
    assert len(array(found["centres"])) == kernel.shape[1] <= (49 if budget == "own" else 16)


def test_landmarks_spectrum_and_predictions(client, explorer):
    found = ask(client, "landmarks", head=1)
    assert array(found["regions"]).shape == tuple(found["grid"])
    assert array(found["centres"]).shape[1] == 2
    spectrum = ask(client, "spectrum")
    eigenvalues = array(spectrum["eigenvalues"])
    assert eigenvalues.shape[0] == 2
    assert eigenvalues.sum() == pytest.approx(eigenvalues.size, rel=1e-5)  # the diagonal is 1
    assert ask(client, "predictions")["kind"] == "boxes"


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("name", ["attention", "landmarks", "spectrum", "predictions"])
def test_every_view_can_be_saved(client, name, kind):
    answer = client.get(f"/figure/{name}.{kind}", query_string=HERE)
    assert answer.status_code == 200
    begins = dict(png=b"\x89PNG", svg=b"<?xml")
    assert answer.data.startswith(begins[kind])


@pytest.mark.parametrize("head", [-1, 1])
def test_what_is_saved_is_what_is_asked_for(client, explorer, monkeypatch, head):
    """By what is drawn: another head, pixel, block, budget or solver draws other numbers."""
    view = View(IMAGE, Settings(4, "direct"), 1, 0, head, 21, 31)
    question = dict(HERE, head=head, x=21, y=31, budget=4, solver="direct")
    drawn = {}
    for name in ("attention", "landmarks", "spectrum", "predictions"):
        draw = getattr(server, f"draw_{name}")

        def record(*args, name=name, draw=draw, **options):
            drawn[name] = args
            return draw(*args, **options)

        monkeypatch.setattr(server, f"draw_{name}", record)
        assert client.get(f"/figure/{name}.svg", query_string=question).status_code == 200

    picture = explorer.captured(IMAGE, explorer.own).image.picture
    for name in ("attention", "landmarks", "predictions"):
        np.testing.assert_array_equal(drawn[name][0], picture)
    found = explorer.attention(view)
    _, points, maps, extent, title = drawn["attention"]
    assert (points, extent) == ([(21, 31)], found["extent"])
    assert title == "stage 1, block 0: 4 landmarks"
    rows, softmax = (found[name].unflatten(-1, found["grid"]).numpy() for name in ROWS)
    kinds, heads = {"SOFT++": rows, "softmax": softmax}, (0, 1) if head < 0 else (1,)
    expected = {}
    for name, each in kinds.items():  # as the page has them: alike
        expected |= {f"{name}, head {one}": each[one] for one in heads}
        expected |= {f"{name}, mean": each.mean(0)} if head < 0 else {}
    assert list(maps) == list(expected)
    for name, one in expected.items():
        np.testing.assert_array_equal(maps[name][0], one)
    found = explorer.landmarks(view)
    assert found["head"] == max(head, 0)
    for ours, name in zip(drawn["landmarks"][1:], ("regions", "strength", "centres", "extent")):
        np.testing.assert_array_equal(ours, found[name])
    found = explorer.spectrum(view)
    for ours, name in zip(drawn["spectrum"], ("eigenvalues", "x", "filters"), strict=True):
        np.testing.assert_array_equal(ours, found[name])
    assert drawn["predictions"][1] is explorer.predictions(view)


ROWS = ("rows", "softmax")


# --------------------------------------------------------------------------------- predictions


def test_boxes_are_those_with_a_score(client, explorer, predicting):
    """Of the model with the settings that are asked for, which it has no longer than that."""
    from mmengine.structures import InstanceData

    boxes = torch.tensor([[1.0, 2, 30, 40], [5, 6, 17, 28], [3, 14, 50, 60]])
    scores = torch.tensor([looking.SCORE + 0.01, looking.SCORE - 0.01, 0.9])
    instances = InstanceData(bboxes=boxes, scores=scores, labels=torch.tensor([1, 2, 0]))
    seen = predicting(pred_instances=instances)
    found = ask(client, "predictions", budget=25, solver="direct")
    assert seen == [{(25, "direct")}]
    assert {(layer.max_landmarks, layer.solver) for layer in explorer.layers.values()} == {
        (None, "newton")
    }
    assert (found["kind"], found["threshold"]) == ("boxes", looking.SCORE)
    np.testing.assert_array_equal(array(found["boxes"]), boxes[[0, 2]])
    np.testing.assert_array_equal(array(found["scores"]), scores[[0, 2]])
    assert array(found["labels"]).tolist() == [1, 0]
    assert found["names"] == list(explorer.config.test_dataloader.dataset.metainfo.classes)


@pytest.mark.parametrize(("largest", "dtype"), [(255, "uint8"), (256, "int32"), (300, "int32")])
def test_maps_of_many_classes(client, predicting, largest, dtype):
    from mmengine.structures import PixelData

    labels = torch.tensor([[[0, 1, largest], [7, 8, 9]]])
    predicting(pred_sem_seg=PixelData(data=labels))
    found = ask(client, "predictions")
    assert (found["kind"], found["map"]["dtype"]) == ("classes", dtype)
    np.testing.assert_array_equal(array(found["map"]), labels[0])


@pytest.fixture
def noise(tmp_path):
    """A folder with one image, 96 pixels high and 128 wide."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "noise.png").write_bytes(png(128, 96))
    return folder


def prediction(config, model, path):
    """What the library says of an image, without us."""
    data = inference_pipeline(config)(dict(img_path=str(path), img_id=0))
    with torch.no_grad():
        return model.test_step(pseudo_collate([data]))[0]


def test_a_map_of_classes_is_that_of_a_config_with_the_settings(root, tmp_path, noise):
    import_library("mmseg")
    config = Config.fromfile(root / "configs/demo/upernet_softpp-mini_shapes.py")
    model = load_model(config)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "model.pth")
    with looking.Explorer(config, model, str(noise)) as explorer:
        client = explorer_client(explorer)
        own = ask(client, "predictions", image="noise.png")
        found = ask(client, "predictions", image="noise.png", budget=1)
    config.model.backbone.max_landmarks = 1
    model = load_model(config, str(tmp_path / "model.pth"))
    expected = prediction(config, model, noise / "noise.png").pred_sem_seg.data[0]
    assert expected.shape == (96, 128)
    assert found["kind"] == "classes"
    np.testing.assert_array_equal(array(found["map"]), expected)
    assert (array(own["map"]) != expected.numpy()).any()


def test_scores_of_a_classifier(noise):
    import_library("mmpretrain")
    model = mini_classifier()
    model["head"]["num_classes"] = 7
    dataset = dict(type="CustomDataset", metainfo=dict(classes=list("abcdefg")))
    dataset["pipeline"] = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]
    parts = dict(default_scope="mmpretrain", model=model, test_dataloader=dict(dataset=dataset))
    config = Config(parts)
    model = load_model(config)
    with looking.Explorer(config, model, str(noise)) as explorer:
        found = ask(explorer_client(explorer), "predictions", image="noise.png")
    expected = prediction(config, model, noise / "noise.png").pred_score
    best = expected.argsort(descending=True)[:5]
    assert (found["kind"], found["names"]) == ("scores", list("abcdefg"))
    assert array(found["labels"]).tolist() == best.tolist()
    np.testing.assert_allclose(array(found["scores"]), expected[best], rtol=1e-6)


@pytest.mark.parametrize(
    ("library", "path", "count", "first"),
    [
        ("mmdet", "retinanet/retinanet_softpp-t_fpn_1x_coco.py", 80, "person"),
        ("mmseg", "upernet/upernet_softpp-t_8xb2-160k_ade20k-512x512.py", 150, "wall"),
        ("mmpretrain", "soft/softpp-tiny_8xb128_in1k.py", 1000, "tench, Tinca tinca"),
    ],
)
def test_classes_of_known_data_sets_have_names(root, tmp_path, library, path, count, first):
    config = Config.fromfile(root / "configs" / path)
    names = looking.Explorer(config, build(library), str(tmp_path)).names
    assert (len(names), names[0]) == (count, first)


def test_names_are_of_the_config_the_checkpoint_or_the_data_set(tmp_path):
    import_library("mmdet")
    dataset = dict(type="RepeatDataset", dataset=dict(type="CocoDataset"))
    parts = dict(default_scope="mmdet", model=mini_detector())
    config = Config(dict(parts, test_dataloader=dict(dataset=dataset)))
    model = load_model(config)
    meta = dict(dataset_meta=dict(classes=("cat", "dog")))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), tmp_path / "model.pth")
    trained = load_model(config, str(tmp_path / "model.pth"))

    def names(model):
        return looking.Explorer(config, model, str(tmp_path)).names

    assert names(model)[:2] == ["person", "bicycle"]
    assert names(trained) == ["cat", "dog"]
    config.test_dataloader.dataset.dataset.metainfo = dict(classes=["cell"])
    assert names(trained) == ["cell"]
    config.test_dataloader.dataset = dict(type="NobodyKnows")
    assert names(model) is None


# ------------------------------------------------------------------------------ what it refuses

PATHS = [
    "../../../../outside.png",
    "../val2017/../../../../outside.png",
    "{workplace}/outside.png",
    "../annotations/instances_val2017.json",
    "..%2f..%2f..%2f..%2foutside.png",
    "/etc/passwd",
    "....//....//model.pth",
    "000000000001.jpg/../../../../../outside.png",
    "../val2017/000000000001.jpg",
    "\x00",
    "upload-../../model.pth",
    "",
]


QUESTIONS = ("attention", "landmarks", "spectrum", "predictions")
ASKING = [f"/api/{name}" for name in ("image", "thumbnail", "usage", *QUESTIONS)]
ASKING += [f"/figure/{name}.{kind}" for name in QUESTIONS for kind in ("png", "svg")]
ASKING += ["/numbers.csv"]  # all addresses that take an image's name


@pytest.mark.parametrize("name", PATHS)
def test_no_file_outside_the_folder(client, images, workplace, name):
    """Not even a picture."""
    (workplace / "outside.png").write_bytes(png())
    name = name.format(workplace=workplace)
    if name.startswith(("../", "/")):
        assert (images / name).is_file()  # it would be found
    for path in ASKING:
        answer = client.get(path, query_string=dict(HERE, image=name))
        assert answer.status_code == 404, path
        assert answer.json["error"].startswith("there is no image")
    for path in (f"/static/{name}", f"/{name}", f"/figure/{name}.png"):
        if name:
            assert client.get(path, follow_redirects=True).status_code in (400, 403, 404)


def test_all_addresses_that_take_an_image_are_asked(client):
    rules = {str(rule) for rule in client.application.url_map.iter_rules()}
    api = {path.replace("/api/", "") for path in rules if path.startswith("/api/")}
    assert api - {"about", "upload"} == {path[5:] for path in ASKING if path.startswith("/api/")}
    assert rules - {f"/api/{name}" for name in api} == {
        "/",
        "/static/<path:filename>",
        "/figure/<name>.<kind>",
        "/numbers.csv",
    }
    assert set(server.FIGURES) == set(QUESTIONS)


def test_a_click_lists_no_folder(client, explorer, monkeypatch):
    """Thousands of images take longer to list than an answer may."""
    ask(client, "attention")
    monkeypatch.setattr(type(explorer), "images", lambda self: {})
    ask(client, "attention", x=21)
    assert client.get("/api/image?image=none.jpg").status_code == 404


def test_images_come_and_go(client, images):
    """And what takes the place of one may lead out of the folder."""
    path, question = images / "late.png", dict(HERE, image="late.png", x=3, y=3)
    statuses = []
    for change in (
        lambda: path.write_bytes(png()),
        path.unlink,
        lambda: path.symlink_to(images.parent / "../annotations/instances_val2017.json"),
        path.unlink,
    ):
        change()
        answers = [
            client.get(f"/api/{name}", query_string=question) for name in ("thumbnail", "attention")
        ]
        statuses.append([answer.status_code for answer in answers])
    assert statuses == [[200, 200], [404, 404], [404, 404], [404, 404]]


def test_a_file_that_is_replaced_is_another_image(client, explorer, images, monkeypatch):
    """Nothing of the file that had the name before is in an answer."""

    def predict(self, name, settings):  # an untrained detector finds nothing in either
        return dict(bytes=self.path(name).stat().st_size)

    monkeypatch.setattr(type(explorer), "_predict", predict)
    paths = ("attention", "usage", "predictions", "image", "landmarks")

    def answers(name):
        question = dict(HERE, image=name, x=9, y=8)
        found = [client.get(f"/api/{path}", query_string=question) for path in paths]
        assert {answer.status_code for answer in found} == {200}
        return [answer.data for answer in found]

    try:
        (images / "same.png").write_bytes(png(60, 40, seed=1))
        before = answers("same.png")
        (images / "fresh.png").write_bytes(png(40, 60, seed=2))
        (images / "same.png").write_bytes(png(40, 60, seed=2))
        after, expected = answers("same.png"), answers("fresh.png")
    finally:
        for name in ("same.png", "fresh.png"):
            (images / name).unlink(missing_ok=True)
    for path, first, second, fresh in zip(paths, before, after, expected, strict=True):
        assert first != second, path
        if path == "attention":  # but for the version, by which the page sees it
            (second, fresh), versions = zip(*(split_version(data) for data in (second, fresh)))
            assert split_version(first)[1] not in versions
        assert second == fresh, path


def split_version(data):
    found = json.loads(data)
    return found, found.pop("version")


def test_no_link_leads_out_of_the_folder(explorer, workplace, images):
    outside = workplace / "outside.png"
    outside.write_bytes(png())
    link = images / "link.png"
    link.symlink_to(outside)
    try:
        assert "link.png" not in explorer.images()
    finally:
        link.unlink()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (dict(stage=3), "stage 3 has no softmax-free attention"),
        (dict(block=7), "numbered from 0; got block 7"),
        (dict(head=2), "head must be -1 for the mean, or 0 to 1, got 2"),
        (dict(x=64), "is outside the image"),
        (dict(x="nan"), "is outside the image"),
        (dict(budget=0), "the budget must be at least 1 and at most 1000000, got 0"),
        (dict(budget=10**22), "the budget must be at least 1 and at most 1000000, got 1000000"),
        (dict(solver="qr"), "solver must be one of"),
        (dict(stage="one"), "no number where one should be"),
    ],
)
def test_invalid_views(client, query, message):
    answer = client.get("/api/attention", query_string={**HERE, **query})
    assert answer.status_code == 400
    assert message in answer.json["error"]


@pytest.mark.parametrize("content", [b"no picture", png()[:100], b""], ids=["text", "cut", "empty"])
def test_a_file_that_is_no_picture(client, images, content):
    """Is named as the page names it, wherever the folder is."""
    path = images / "broken.png"
    path.write_bytes(content)
    try:
        for name in ("image", "thumbnail", "attention", "predictions"):
            answer = client.get(f"/api/{name}", query_string=dict(HERE, image="broken.png"))
            assert answer.status_code == 400, name
            assert answer.json["error"] == "broken.png is not an image that can be read"
    finally:
        path.unlink()


def test_a_file_that_may_not_be_read(client, explorer, monkeypatch):
    def gone(*args):
        raise PermissionError(13, "Permission denied", "/secret/place.png")

    monkeypatch.setattr(type(explorer), "captured", gone)
    answer = client.get("/api/image", query_string=HERE)
    assert answer.status_code == 404
    assert answer.json["error"] == "the image cannot be read: Permission denied"


def test_only_this_machine_is_answered(client):
    assert client.get("/", headers=dict(Host="127.0.0.1:8765")).status_code == 200
    assert client.get("/", headers=dict(Host="example.org")).status_code == 403
    headers = dict(Origin="http://example.org")
    assert client.post("/api/upload", data=png(), headers=headers).status_code == 403


# ------------------------------------------------------------------------------------- uploads


def test_a_turned_picture_is_upright_everywhere(client, images):
    """As the models' pipelines turn it: of the folder, small, and sent."""
    from PIL import Image

    upright = np.zeros((30, 40, 3), np.uint8)
    upright[:, 20:] = 255
    content = rotated(upright[..., ::-1])  # stored as it is, to be turned to 40 x 30
    (images / "turned.jpg").write_bytes(content)
    try:
        sent = client.post("/api/upload", data=content).json["image"]
        for name in ("turned.jpg", sent):
            for path in ("image", "thumbnail"):
                answer = client.get(f"/api/{path}", query_string=dict(image=name))
                pixels = np.asarray(Image.open(io.BytesIO(answer.data)))
                assert pixels.shape == (40, 30, 3), (name, path)
                assert pixels[:15].max() < 60, (name, path)
                assert pixels[25:].min() > 200, (name, path)
    finally:
        (images / "turned.jpg").unlink()


@pytest.mark.parametrize("shape", [(30, 40), (30, 40, 3)], ids=["grey", "RGB"])
@pytest.mark.parametrize("highest", [1000, 65535])
def test_sixteen_bits_are_those_of_the_same_file_in_the_folder(client, images, shape, highest):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, highest, shape, np.uint16, endpoint=True)
    content = cv2.imencode(".png", pixels)[1].tobytes()
    (images / "deep.png").write_bytes(content)
    try:
        sent = client.post("/api/upload", data=content).json["image"]
        for path in ("image", "thumbnail"):
            pictures = [
                np.asarray(Image.open(io.BytesIO(client.get(f"/api/{path}?image={name}").data)))
                for name in ("deep.png", sent)
            ]
            np.testing.assert_array_equal(*pictures)
            assert pictures[0].max() == highest // 256
    finally:
        (images / "deep.png").unlink()


def test_an_upload_is_for_who_sent_it(client):
    name = client.post("/api/upload", data=png()).json["image"]
    assert name not in client.get("/api/about").json["images"]
    found = ask(client, "attention", image=name, x=39, y=29)
    assert array(found["rows"]).shape[0] == 2
    other = client.post("/api/upload", data=png(seed=1)).json["image"]
    assert other != name
    assert len(name) > 20


def test_uploads_are_bounded(client, explorer, monkeypatch):
    from mmsoft.explore import looking

    assert client.post("/api/upload", data=b"no picture").status_code == 400
    assert client.post("/api/upload", data=png()[:100]).status_code == 400
    too_large = client.post("/api/upload", data=bytes(looking.UPLOAD_BYTES + 1))
    assert too_large.status_code == 413
    monkeypatch.setattr(looking, "UPLOAD_PIXELS", 100)
    answer = client.post("/api/upload", data=png())
    assert answer.status_code == 400
    assert "million pixels" in answer.json["error"]
    monkeypatch.undo()
    monkeypatch.setattr(looking, "UPLOADS", 2)
    names = [client.post("/api/upload", data=png(seed=seed)).json["image"] for seed in range(3)]
    statuses = [client.get(f"/api/thumbnail?image={name}").status_code for name in names]
    assert statuses == [404, 200, 200]
    assert len(list(explorer.path(names[1]).parent.iterdir())) == 2


def test_visitors_at_once_get_what_each_asked_for(client, explorer):
    """Two budgets, in turn and at the same time, with nothing kept."""
    views = [dict(budget="4"), dict(budget="9"), dict(budget="own"), dict(solver="direct")]
    expected = [ask(client, "attention", **view)["rows"]["bytes"] for view in views]
    assert len(set(expected)) == len(views)
    for kept in (explorer.captures, explorer.rows):
        kept.values.clear()

    def visit(view):
        return ask(explorer_client(explorer), "attention", **view)["rows"]["bytes"]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(visit, views * 2))
    different = [view for view, a, b in zip(views * 2, found, expected * 2) if a != b]
    assert not different
    layer = next(iter(explorer.layers.values()))
    assert (layer.max_landmarks, layer.solver) == (None, "newton")


def explorer_client(explorer):
    from mmsoft.explore.server import make_app

    return make_app(explorer).test_client()


def test_what_is_kept_is_bounded():
    from mmsoft.explore.looking import Kept

    kept = Kept(3)
    made = []
    for key in (1, 2, 3, 1, 4, 1, 2):
        assert kept.get(key, lambda key=key: made.append(key) or key) == key
    assert made == [1, 2, 3, 4, 2]
    assert list(kept.values) == [4, 1, 2]


def test_what_is_kept_is_not_waited_for():
    """While another value is made; but each is made once."""
    from mmsoft.explore.looking import Kept

    kept, going, go, made = Kept(3), threading.Event(), threading.Event(), []

    def slow():
        going.set()
        assert go.wait(60)
        made.append("slow")
        return "slow"

    kept.get("there", lambda: "there")
    threads = [threading.Thread(target=kept.get, args=("slow", slow)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert going.wait(60)
    quick = threading.Thread(target=lambda: made.append(kept.get("there", lambda: "again")))
    other = threading.Thread(target=lambda: made.append(kept.get("other", lambda: "other")))
    for thread in (quick, other):
        thread.start()
        thread.join(10)
    assert made == ["there", "other"]
    go.set()
    for thread in threads:
        thread.join()
    assert made == ["there", "other", "slow"]


def test_what_is_made_is_not_made_again_before_it_is_kept(monkeypatch):
    from mmsoft.explore.looking import Kept

    kept, keeping, go, made = Kept(3), threading.Event(), threading.Event(), []
    keep = kept._keep

    def slow(key, value):
        keeping.set()
        assert go.wait(60)
        keep(key, value)

    monkeypatch.setattr(kept, "_keep", slow)
    threads = [
        threading.Thread(target=kept.get, args=(1, lambda: made.append(1))) for _ in range(2)
    ]
    threads[0].start()
    assert keeping.wait(60)
    threads[1].start()
    threads[1].join(1)  # time enough to make it again
    go.set()
    for thread in threads:
        thread.join(60)
    assert made == [1]


def test_who_waits_for_what_cannot_be_made_hears_why():
    from mmsoft.explore.looking import Kept

    kept, going, go, heard = Kept(3), threading.Event(), threading.Event(), []

    def fail():
        going.set()
        assert go.wait(60)
        raise ValueError("too large")

    def ask_for_it():
        try:
            kept.get(1, fail)
        except ValueError as error:
            heard.append(str(error))

    threads = [threading.Thread(target=ask_for_it) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert going.wait(60)
    go.set()
    for thread in threads:
        thread.join(60)
    assert heard == ["too large"] * 3


def test_rows_are_bounded_with_the_layers_that_they_hold(client, explorer, monkeypatch):
    """Queries, values and landmarks, which an image that is no longer kept leaves to them."""

    def look():
        explorer.rows.values.clear()
        for stage in (0, 1):
            ask(client, "attention", stage=stage)
        return list(explorer.rows.values.values())

    kept = look()
    assert len(kept) == 2
    held = sum(
        tensor.nbytes
        for rows in kept
        for tensor in (rows.kernel, rows.state.q, rows.state.v, rows.state.landmarks)
    )
    monkeypatch.setattr(explorer.rows, "limit", held - 1)
    assert len(look()) == 1


def test_layers_are_bounded(client, explorer, monkeypatch):
    """With the picture and the input that they are of."""

    def look(*budgets):
        explorer.captures.values.clear()
        for budget in budgets:
            ask(client, "usage", budget=budget)
        return list(explorer.captures.values.values())

    (one,) = look(4)
    held = one.image.picture.nbytes + one.image.inputs.nbytes + one.features.nbytes
    held += sum(t.nbytes for s in one.states.values() for t in (s.q, s.v, s.landmarks))
    monkeypatch.setattr(explorer.captures, "limit", 2 * held)
    assert len(look(4, 4)) == 1
    assert [captured.key[2].budget for captured in look(3, 4, 2)] == [4, 2]
    monkeypatch.setattr(explorer.captures, "limit", 1)
    assert len(look(4, 3)) == 1


def test_answers_are_bounded(client, explorer, monkeypatch, predicting):
    """A map of classes has the size of the file."""
    from mmengine.structures import PixelData

    labels = PixelData(data=torch.zeros(1, 50, 50, dtype=torch.int64))
    predicting(pred_sem_seg=labels)
    monkeypatch.setattr(explorer.found, "limit", 50 * 50 * 2)
    for budget in (3, 4, 5):
        ask(client, "predictions", budget=budget)
    assert len(explorer.found.values) == 2


@pytest.mark.parametrize(("tokens", "status"), [(1600, 200), (1599, 400)])
@pytest.mark.parametrize("size", [(320, 160), (80, 16)], ids=str)
def test_images_of_too_many_tokens(client, images, monkeypatch, size, tokens, status):
    """By the 160 x 160 pixels in which they come to the model, from the folder or sent."""
    monkeypatch.setattr(looking, "LARGEST_GRID", tokens)
    if status == 400 and size == (320, 160):  # seen before anything as large as the file is made
        monkeypatch.setattr(looking, "load_image", None)
    path, content = images / "large.png", png(*size)
    path.write_bytes(content)
    try:
        for name in (path.name, client.post("/api/upload", data=content).json["image"]):
            for kind in ("image", "attention", "predictions"):
                question = dict(HERE, image=name, y=5)
                answer = client.get(f"/api/{kind}", query_string=question)
                assert answer.status_code == status, answer.json
                if status == 400:
                    assert answer.json["error"] == (
                        f"{name} comes to the model as 160 x 160 pixels, 1600 tokens of its "
                        "first stage, and the explorer takes at most 1599"
                    )
    finally:
        path.unlink()


def test_what_could_not_be_made_can_be_asked_for_again():
    from mmsoft.explore.looking import Kept

    kept = Kept(3)
    with pytest.raises(ZeroDivisionError):
        kept.get(1, lambda: 1 // 0)
    assert kept.get(1, lambda: 2) == 2
    assert not kept.making


def test_a_folder_that_is_none(explorer, tmp_path):
    from mmsoft.explore.looking import Explorer

    with pytest.raises(ValueError, match="is not a folder of images"):
        Explorer(explorer.config, explorer.model, str(tmp_path / "nothing"))
