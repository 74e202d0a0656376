"""Public data sets as they are published: the flags that read each, and the events that come out."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from generative_recommenders.data.readers.events import EventReader, ReadOptions
from generative_recommenders.errors import UserError

SECOND = 10**9
FORMATS = {
    "Amazon 2014": (
        "ratings_Books.csv", "AH2L9G3DQHHAJ,0000000116,4.0,1019865600\n",
        ReadOptions("user,item,rating,timestamp"), ("AH2L9G3DQHHAJ", "0000000116", 4.0, 1019865600),
    ),
    "Amazon 2018": (
        "Books.csv", "0001713353,A1C6M8LCIX4M6M,5.0,1123804800\n",
        ReadOptions("item,user,rating,timestamp"), ("A1C6M8LCIX4M6M", "0001713353", 5.0, 1123804800),
    ),
    "Amazon 2018, reviews": (
        "Books.json",
        '{"overall": 5.0, "verified": true, "reviewTime": "08 12, 2005", "reviewerID": "A1C6M8", "asin": "0001713353", '
        '"style": {"Format:": " Hardcover"}, "reviewText": "Fine.", "unixReviewTime": 1123804800}\n',
        ReadOptions("user=reviewerID,item=asin,rating=overall,timestamp=unixReviewTime"),
        ("A1C6M8", "0001713353", 5.0, 1123804800),
    ),
    "Amazon 2023": (
        "Books.csv",
        "user_id,parent_asin,rating,timestamp\nAGKASBHYZPGTEPO6LWZPVJWB2BVA,1782490671,5.0,1641648017503\n",
        ReadOptions(), ("AGKASBHYZPGTEPO6LWZPVJWB2BVA", "1782490671", 5.0, 1641648017.503),
    ),
    "Amazon 2023, with history": (
        "Books.train.csv",
        "user_id,parent_asin,rating,timestamp,history\nAGKA,1782490671,5.0,1641648017503,0001 0002\n",
        ReadOptions(), ("AGKA", "1782490671", 5.0, 1641648017.503),
    ),
    "Amazon 2023, reviews": (
        "Books.jsonl",
        '{"rating": 5.0, "title": "Such a lovely scent", "text": "This", "images": [], "asin": "B00YQ6X8EO", '
        '"parent_asin": "B00YQ6X8XX", "user_id": "AGKH", "timestamp": 1588687728923, '
        '"helpful_vote": 0, "verified_purchase": true}\n',
        ReadOptions("user=user_id,item=parent_asin,rating,timestamp"), ("AGKH", "B00YQ6X8XX", 5.0, 1588687728.923),
    ),
    "ML-25M and ML-32M": (
        "ratings.csv", "userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n",
        ReadOptions(), ("1", "296", 5.0, 1147880044),
    ),
    "Yoochoose": (
        "yoochoose-clicks.dat", "1,2014-04-07T10:51:09.277Z,214536502,0\n",
        ReadOptions("user,timestamp,item,_"), ("1", "214536502", None, 1396867869.277),
    ),
    "Diginetica": (
        "train-item-views.csv", "sessionId;userId;itemId;timeframe;eventdate\n1;NA;81766;526309;2016-05-09\n",
        ReadOptions("user=sessionId,item=itemId,timestamp=eventdate"), ("1", "81766", None, 1462752000),
    ),
    "RetailRocket": (
        "events.csv", "timestamp,visitorid,event,itemid,transactionid\n1433221332117,257597,view,355908,\n",
        ReadOptions(), ("257597", "355908", None, 1433221332.117),
    ),
    "Gowalla": (
        "loc-gowalla_totalCheckins.txt", "0\t2010-10-19T23:55:27Z\t30.2359091167\t-97.7951395833\t22847\n",
        ReadOptions("user,timestamp,_,_,item"), ("0", "22847", None, 1287532527),
    ),
    "LastFM-1K": (
        "userid-timestamp-artid-artname-traid-traname.tsv",
        'user_000001\t2009-05-04T23:08:57Z\tf1b1cf71\tDeep "Dish"\tt1\tSome Title\n',
        ReadOptions("user,timestamp,_,_,item,_"), ("user_000001", "t1", None, 1241478537),
    ),
    "Steam": (
        "steam_reviews.jsonl", '{"username": "Chaos", "hours": 4.1, "product_id": "328100", "date": "2017-12-17"}\n',
        ReadOptions("user=username,item=product_id,timestamp=date"), ("Chaos", "328100", None, 1513468800),
    ),
    "Yelp": (
        "yelp_academic_dataset_review.json",
        '{"user_id": "mh_", "business_id": "XQf", "stars": 3.0, "text": "I", "date": "2018-07-07 22:09:11"}\n',
        ReadOptions(), ("mh_", "XQf", 3.0, 1531001351),
    ),
    "H&M": (
        "transactions_train.csv",
        '"t_dat","customer_id","article_id","price","sales_channel_id"\n"2018-09-20","000058a1","0663713001",0.0508,2\n',
        ReadOptions("user=customer_id,item=article_id,timestamp=t_dat"), ("000058a1", "0663713001", None, 1537401600),
    ),
    "RecBole": (
        "ml-100k.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n",
        ReadOptions(), ("196", "242", 3.0, 881250949),
    ),
    "Goodreads": (
        "goodreads_interactions.json",
        '{"user_id": "8842281e", "book_id": "24375664", "rating": 5, "is_read": true, '
        '"date_added": "Fri Aug 25 13:55:02 -0700 2017", "date_updated": "Mon Oct 09 08:55:59 -0700 2017", '
        '"read_at": "Sat Oct 07 00:00:00 -0700 2017", "started_at": ""}\n',
        ReadOptions("user=user_id,item=book_id,rating,timestamp=date_added"), ("8842281e", "24375664", 5.0, 1503694502),
    ),
}  # fmt: skip
"""Name -> (file, its first lines, options of the reader, (user, item, rating or None, seconds) of the first event)."""


@pytest.mark.parametrize("name", FORMATS)
def test_published_format(tmp_path: Path, name: str) -> None:
    file, text, options, (user, item, rating, seconds) = FORMATS[name]
    path = tmp_path / file
    path.write_text(text)
    event = pa.concat_tables(EventReader([path], options).batches()).to_pylist()[0]
    assert (event["user"], event["item"], event.get("rating")) == (user, item, rating)
    assert event["timestamp"] / SECOND == pytest.approx(seconds, abs=1e-3)


@pytest.mark.parametrize("name", ["Diginetica", "Goodreads", "Steam", "H&M"])
def test_a_published_format_with_a_doubtful_time_asks_for_columns(tmp_path: Path, name: str) -> None:
    file, text, _, _ = FORMATS[name]
    path = tmp_path / file
    path.write_text(text)
    with pytest.raises(UserError, match="--columns"):
        EventReader([path], ReadOptions())
