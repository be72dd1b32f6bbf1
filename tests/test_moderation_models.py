"""Moderation's listings and models with what strangers send: bad input, masked modalities, one class, exports that agree."""
import io
import math
import re

import numpy as np
import pytest

from opml_wb.moderation import Listing, ListingError, Market, TopicModel, encode, precision_at_k, read
from opml_wb.moderation.models import onnx
from opml_wb.moderation.models.features import WIDTH
from opml_wb.moderation.models.topics import KINDS


@pytest.fixture(scope="module")
def market(): return Market(rate=900, violations=.02, evasion=.4, seed=3)


@pytest.fixture(scope="module")
def days(market): return [market.day(d) for d in range(3)]


@pytest.fixture(scope="module")
def fitted(market, days):
    train = encode(days[0] + days[1])
    y = market.violates(days[0] + days[1], "weapons")
    return {kind: TopicModel(kind, "weapons", **({"words": market.words("weapons")} if kind == "rules" else {})).fit(train, y) for kind in KINDS}


def png(size):
    from PIL import Image
    file = io.BytesIO()
    Image.new("RGB", size, (90, 20, 20)).save(file, "PNG")
    return file.getvalue()


ODD = [Listing("empty", ""), Listing("blank", "   "), Listing("mixed", "Nike ナイキ 나이키 Найк"), Listing("zero", "knife", price=0),
       Listing("minus", "knife", price=-5), Listing("nan", "knife", price=math.nan), Listing("inf", "knife", price=math.inf),
       Listing("corrupt", "knife", image=b"\x89PNG junk"), Listing("emoji", "🔪🔪🔪 👜"), Listing("nothing"),
       Listing("one pixel", "bag", image=np.zeros((1, 1, 3), np.uint8)), Listing("wide", "bag", image=png((900, 3))),
       Listing("long", "knife " * 1600), Listing("control", "kn\x00ife\u202e\u200b")]


@pytest.mark.parametrize("kind", KINDS)
def test_odd_listings_get_finite_scores(fitted, kind):
    score = fitted[kind].score(ODD)
    assert score.dtype == np.float32 and np.isfinite(score).all() and ((0 <= score) & (score <= 1)).all()


def test_what_is_unusable_is_masked_by_name():
    why = {x.id: dict(x.why) for x in ODD}
    assert why["zero"] == {"price": "price: 0 is no price"} and why["minus"] == {"price": "price: -5 is no price"}
    assert why["nan"] == {} and "inf" in why["inf"]["price"] and "decoded" in why["corrupt"]["image"] and why["empty"] == {"text": "title: empty"}
    assert [x.id for x in ODD if x.has == (False, False, False)] == ["empty", "blank", "nothing"]


@pytest.mark.parametrize("given, said", [
    (dict(id="a", title="x" * 100_000), "'a': title: 100,000 characters; at most 10,000"), (dict(id="a", image=bytes(50_000_000)), "50,000,000 bytes"),
    (dict(id="a", title=3), "title: expected text"), (dict(id="", title="x"), "id: expected a text"), (dict(id="a", price="dear"), "price: expected a number"),
    (dict(id="a", image=np.zeros((4, 4), np.uint8)), "image: expected bytes")])
def test_what_is_refused_says_the_field(given, said):
    with pytest.raises(ListingError, match=said): Listing(**given)


def test_a_bomb_of_pixels_is_refused():
    with pytest.raises(ListingError, match="pixels; at most"): Listing("a", "bag", image=png((9000, 9000)))


def test_tables_with_double_ids_and_topics_that_are_not_there():
    with pytest.raises(ListingError, match="id a stands more than once"): read([{"id": "a"}, {"id": "a"}])
    with pytest.raises(KeyError, match="expected a column 'id'"): read([{"title": "a"}])
    with pytest.raises(ValueError, match="topic: expected one of weapons, money, counterfeit, got 'tanks'"): Market().violates([], "tanks")
    with pytest.raises(KeyError, match="no listing of this market"): Market().truth(Listing("a"))


@pytest.mark.parametrize("columns, said", [
    ({"time": ["2024-01-02", "soon"]}, "time: 'soon' is no date, in row 2"), ({"violates": ["yes", 0]}, "violates: expected 0 or 1, got yes in row 1"),
    ({"image": ["nope.png", None]}, "listing '1': image: No such file or directory"), ({"id": [1, None]}, "id: missing in row 2"),
    ({"price": ["$12.50", 3]}, "listing '1': price: expected a number"), ({"time": ["2024-01-02", None]}, "time: missing in row 2"),
    ({"time": ["03/04/2024", "04/04/2024"]}, "time: '03/04/2024' in row 1 can be 03 April or 04 March; give ISO 8601, such as 2024-04-03"),
    ({"time": ["13.04.2024", "04.13.2024"]}, "time: '04.13.2024' in row 2 and '13.04.2024' in row 1 have their months in different places"),
    ({"time": ["03/04/24", "13/04/24"]}, "time: '03/04/24' is no date, in row 1; give ISO 8601"), ({"time": ["31/02/2024", "13/04/2024"]}, "'31/02/2024' is no date"),
    ({"time": [-5, 7]}, "time: '-5' is no date, in row 1; give ISO 8601 or seconds"), ({"id": [1, "1"]}, "id 1 stands more than once")])
def test_a_strangers_table_is_refused_by_row_and_name(tmp_path, columns, said):
    import pandas as pd

    from opml_wb.moderation.experiment import of_table
    pd.DataFrame({"id": [1, 2], "title": ["knife", "bag"], "violates": [1, 0], **columns}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ValueError, match=re.escape(said)): of_table(tmp_path / "t.csv", days=1)


def test_a_strangers_table_is_read_as_it_is_meant(tmp_path):
    "Dates as text of several kinds, pictures beside the table, numbers as titles and sellers, what is missing masked."
    import pandas as pd

    from opml_wb.moderation.experiment import of_table
    (tmp_path / "a.png").write_bytes(png((8, 8)))
    pd.DataFrame({"id": [7, 8, 9], "title": [123, 456, 789], "seller": [1, 2, 3], "violates": [True, False, False], "price": [9.5, None, 2],
                  "image": ["a.png", None, None], "time": ["3 Jan 2024", "2024-01-02", "Jan 1, 2024 10:00"]}).to_csv(tmp_path / "t.csv", index=False)
    found = of_table(tmp_path / "t.csv", days=3)
    assert [[(x.id, x.title, x.seller, x.has) for x in day] for day in found.listings] == [
        [("9", "789", "3", (True, False, True))], [("8", "456", "2", (True, False, False))], [("7", "123", "1", (True, True, True))]]
    assert [y.tolist() for y in found.y] == [[False], [False], [True]]


@pytest.mark.parametrize("time, days", [
    (["03/04/2024", "13/04/2024", "02/05/2024"], [(4, 3), (4, 13), (5, 2)]), (["3-4-2024 10:00", "4-13-2024 9:00", "5-2-2024"], [(3, 4), (4, 13), (5, 2)]),
    (["2024-03-01T00:00:00+09:00", "2024-02-29 16:00:00", "20240301"], [(2, 29), (2, 29), (3, 1)]), ([1700000000, 1700000000000, 1.7e18], [(11, 14)] * 3),
    (["01/01/2024", "3 May 2024", "2024-06-01"], [(1, 1), (5, 3), (6, 1)])])
def test_dates_are_read_by_one_order_that_the_column_shows(tmp_path, time, days):
    import pandas as pd

    from opml_wb.moderation.experiment import labelled
    pd.DataFrame({"id": range(3), "violates": 1, "time": time}).to_csv(tmp_path / "t.csv", index=False)
    when = pd.to_datetime(labelled(tmp_path / "t.csv").time, unit="s")
    assert sorted(zip(when.dt.month, when.dt.day)) == sorted(days)


def test_texts_of_a_table_stay_as_they_stand(tmp_path):
    from opml_wb.moderation.experiment import labelled
    (tmp_path / "t.csv").write_text("id,violates,title,brand,seller\n007,1,NA,501,0012\n7,0,None,,\n")
    found = read(labelled(tmp_path / "t.csv"))
    assert [(x.id, x.title, x.brand, x.seller) for x in found] == [("007", "NA", "501", "0012"), ("7", "None", "", "")]
    with pytest.raises(ListingError, match="id 1 stands more than once"): read([{"id": 1}, {"id": "1"}])


def test_a_time_that_is_none_is_masked_by_name():
    for time in (1.7e12, "2024-01-01", "yesterday", float("nan"), -1, float("inf"), True):
        odd = Listing("a", "bag", time=time)
        assert odd.time == 0 and "is no number of seconds from 1970 to 2100" in odd.why["time"]
    assert [(x.time, dict(x.why)) for x in (Listing("a", "bag", time=t) for t in (None, 0, 1.7e9, "5"))] == [(0, {}), (0, {}), (1.7e9, {}), (5, {})]


def test_rules_are_weighed_and_a_class_without_weight_is_named():
    seen, y = [Listing(str(i), "toy gun" if i < 10 else "real gun") for i in range(20)], np.arange(20) >= 10
    def gun(weight): return TopicModel("rules", "weapons", words=["gun"]).fit(seen, y, weight).score(seen)[0]
    assert gun([1000.] * 10 + [1.] * 10) < .01 < .25 < gun(None) == gun([1.] * 20) == gun([7.] * 20) < .5
    assert gun([0.] * 10 + [1.] * 10) == TopicModel("rules", "weapons", words=["gun"]).fit(seen[10:], y[10:]).score(seen)[10]
    mined = TopicModel("rules", "weapons").fit(seen, y, [1.] * 10 + [0.] * 10)
    assert not len(mined.parts["words"])
    for weight, said in (((1, 0), "no violation of weapons in 10 listings of a weight above 0"), ((0, 1), "only violations of weapons in 10 listings")):
        with pytest.raises(ValueError, match=said): TopicModel("lr", "weapons").fit(seen, y, np.repeat(weight, 10))


def test_commands_refuse_by_name(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from opml_wb.core.record.models import ModelStore
    from opml_wb.moderation.commands import moderation
    monkeypatch.setenv("OPML_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    (tmp_path / "t.csv").write_text("id,violates\n")
    typo, table = str(tmp_path / "typo.db"), str(tmp_path / "t.csv")
    for words, said in ((["review", typo, "--moderator", "ann"], "there is no file"), (["status", typo], "there is no file"),
                        (["retrain", "../x", table], "topic: expected letters, digits, _ and -"), (["promote", "a@2", "1"], "topic: expected letters"),
                        (["simulate", "1", "--kind", "foo"], "'foo' is not one of"),
                        (["simulate", "1", "-k", "0"], "Invalid value for '-k'")):
        told = CliRunner().invoke(moderation, words)
        assert told.exit_code == 2 and said in told.output, (words, told.output)
    assert not (tmp_path / "typo.db").exists()
    store = ModelStore()
    store.publish("shop-weapons", table)
    assert CliRunner().invoke(moderation, ["promote", "weapons", "1", "--name", "shop"]).exit_code == 0 and store.current("shop-weapons") == 1


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "rules"])
def test_one_class_only_is_refused_and_no_listings_are_no_scores(days, fitted, kind):
    for y in (np.zeros(len(days[0])), np.ones(len(days[0]))):
        with pytest.raises(ValueError, match="both are needed"): TopicModel(kind, "weapons").fit(days[0], y)
    assert len(fitted[kind].score([])) == 0
    with pytest.raises(ValueError, match="weight: expected"): TopicModel(kind).fit(days[0], np.zeros(len(days[0])), weight=[1])


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "rules"])
def test_the_exported_graph_scores_as_the_model(days, fitted, kind, tmp_path):
    "1,000 listings, some with masked modalities, calibrated and not."
    x = encode((days[2] + days[1])[:1000])
    for model in (fitted[kind], TopicModel.load(saved(fitted[kind], tmp_path / "m.npz"))):
        model.to_onnx(tmp_path / "m.onnx")
        for seen in (x, x.mask("image"), x.mask("text", "price")):
            assert np.abs(onnx.run(tmp_path / "m.onnx", seen.dense()) - model.score(seen)).max() <= 1e-5


def saved(model, path):
    model.save(path)
    return path


def test_graphs_of_onnx_and_torch_agree(days, fitted, tmp_path):
    "The network itself, in torch, beside its graph."
    import torch

    from opml_wb.moderation.models.gmu import module
    x = encode(days[2])
    for kind in ("gmu", "concat"):
        parts = fitted[kind].parts
        rest = (np.hstack([x.image, x.price]) - parts["mean"]) / parts["sd"]
        with torch.inference_mode():
            logit = module(parts)(torch.tensor(np.hstack([x.text.toarray() * 4, rest]), dtype=torch.float32), torch.tensor(x.has, dtype=torch.float32)).numpy()
        fitted[kind].to_onnx(tmp_path / "net.onnx")
        assert np.abs(1 / (1 + np.exp(-logit - parts["prior"])) - onnx.run(tmp_path / "net.onnx", x.dense())).max() <= 1e-5
    assert x.dense().shape[1] == WIDTH


def test_pictures_matter_here_and_masking_them_costs_precision(market, fitted):
    "Paired over days of one market whose words are disguised; scores stay finite."
    hidden = Market(rate=900, violations=.02, evasion=.8, seed=4)
    lost = []
    for d in range(6):
        day = hidden.day(d)
        x, y = encode(day), hidden.violates(day, "weapons")
        seen, blind = (fitted["gmu"].score(v) for v in (x, x.mask("image")))
        assert np.isfinite(blind).all()
        lost.append(precision_at_k(y, seen, 15) - precision_at_k(y, blind, 15))
    assert np.mean(lost) > 0


def test_a_market_is_what_it_says():
    a, b = (Market(rate=400, seed=5) for _ in range(2))
    for d in range(2): assert [(x.id, x.title, x.price) for x in a.day(d)] == [(x.id, x.title, x.price) for x in b.day(d)]
    day = Market(5, rate=4000, violations=.01, seed=6).day(0)
    topics = Market(5, rate=4000, violations=.01, seed=6)
    topics.day(0)
    assert .003 < topics.violates(day, "medicine").mean() < .03
    both = [x for x in day if len(topics.truth(x)) > 1]
    assert both and topics.truth(both[0]) == {"money", "counterfeit"}


def test_sellers_move_to_what_is_not_deleted():
    market = Market(rate=1500, violations=.03, evasion=.3, adapt=3, seed=7)
    before = market.weights["money"][0]
    for d in range(4):
        day = market.day(d)
        market.learn(day, [x.id for x in day if market.style(x) == "plain"])
    assert market.weights["money"][0] < .3 * before
