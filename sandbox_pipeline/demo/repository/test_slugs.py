"""What slugify must do."""

import unittest

from slugs import slugify


class SlugifyTest(unittest.TestCase):
    def test_joins_words(self):
        self.assertEqual(slugify("Hello World"), "hello-world")

    def test_drops_punctuation_and_repeated_dashes(self):
        self.assertEqual(slugify("  Rock & Roll -- live! "), "rock-roll-live")


if __name__ == "__main__":
    unittest.main()
