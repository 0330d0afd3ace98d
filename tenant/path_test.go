// SPDX-License-Identifier: Apache-2.0

package tenant

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestParsePath(t *testing.T) {
	for _, in := range []string{"a", "acme", "acme/vision/train", "a/b/c/d/e", "4chan", "a-b/c--d", strings.Repeat("x", 40)} {
		if got, err := ParsePath(in); err != nil || string(got) != in {
			t.Errorf("%q: got %q, %v", in, got, err)
		}
	}
	for in, want := range map[string]string{
		"":                      "tenant path is empty: write an organisation, or organisation/team",
		"/acme":                 `tenant path "/acme": has an empty part (a slash at an end, or two together)`,
		"acme/":                 `tenant path "acme/": has an empty part (a slash at an end, or two together)`,
		"a//b":                  `tenant path "a//b": has an empty part (a slash at an end, or two together)`,
		"a/b/c/d/e/f":           `tenant path "a/b/c/d/e/f" has 6 parts, at most 5 are allowed`,
		"Acme":                  `tenant path "Acme": part "Acme" has upper-case letters, write "acme"`,
		"acme/..":               `tenant path "acme/..": part ".." has the character '.', only a-z, 0-9 and - are allowed`,
		"-acme":                 `tenant path "-acme": part "-acme" must begin and end with a letter or a digit`,
		"acme-":                 `tenant path "acme-": part "acme-" must begin and end with a letter or a digit`,
		"acmé":                  `tenant path "acmé": part "acmé" has the character 'é', only a-z, 0-9 and - are allowed`,
		strings.Repeat("x", 41): `tenant path "` + strings.Repeat("x", 41) + `": part "` + strings.Repeat("x", 41) + `" is 41 characters long, at most 40 are allowed`,
	} {
		if got, err := ParsePath(in); err == nil || err.Error() != want {
			t.Errorf("%q: got %q, %v, want %s", in, got, err, want)
		}
	}
}

func TestPathTree(t *testing.T) {
	for _, tt := range []struct {
		path, parent Path
		ancestors    []Path
		depth        int
	}{
		{"acme", "", nil, 1},
		{"acme/vision", "acme", []Path{"acme"}, 2},
		{"acme/vision/train", "acme/vision", []Path{"acme", "acme/vision"}, 3},
		{"", "", nil, 0},
	} {
		if got := tt.path.Parent(); got != tt.parent {
			t.Errorf("%q parent: got %q, want %q", tt.path, got, tt.parent)
		}
		if diff := cmp.Diff(tt.ancestors, tt.path.Ancestors(), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%q ancestors (-want +got):\n%s", tt.path, diff)
		}
		if got := tt.path.Depth(); got != tt.depth {
			t.Errorf("%q depth: got %d, want %d", tt.path, got, tt.depth)
		}
	}
	for _, tt := range []struct {
		p, q Path
		want bool
	}{
		{"acme", "acme", true}, {"acme", "acme/vision", true}, {"acme", "acme-labs", false}, {"acme", "acme-labs/x", false},
		{"acme/vision", "acme", false}, {"", "acme", false}, {"", "", false},
	} {
		if got := tt.p.Contains(tt.q); got != tt.want {
			t.Errorf("%q contains %q: got %v, want %v", tt.p, tt.q, got, tt.want)
		}
	}
}
