// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPercentile(t *testing.T) {
	s := series{5, 1, 4, 2, 3}
	for p, want := range map[int]float64{0: 1, 10: 1, 50: 3, 90: 5, 100: 5} {
		if got := s.percentile(p); got != want {
			t.Errorf("percentile %d: got %v, want %v", p, got, want)
		}
	}
	if got := (series{4, 1, 2, 3}).p50(); got != 2.5 {
		t.Errorf("median of an even number: got %v, want 2.5", got)
	}
	if got := (series{}).p50(); got != 0 {
		t.Errorf("median of nothing: got %v", got)
	}
	if diff := cmp.Diff(series{2, 0}, pairs(series{4, 1, 9}, series{2, 0})); diff != "" {
		t.Errorf("pairs (-want +got):\n%s", diff)
	}
}

func TestJudge(t *testing.T) {
	for _, c := range []struct {
		name string
		row  row
		want bool
	}{
		{"information", row{Value: 9, Better: "lower"}, true},
		{"low enough", row{Value: 9, Better: "lower", Limit: 9, LimitOn: "value"}, true},
		{"too high", row{Value: 9.1, Better: "lower", Limit: 9, LimitOn: "value"}, false},
		{"high enough", row{Value: 1, Ratio: 0.95, Better: "higher", Limit: 0.95, LimitOn: "ratio"}, true},
		{"too low", row{Value: 1, Ratio: 0.94, Better: "higher", Limit: 0.95, LimitOn: "ratio"}, false},
		{"nothing to compare with", row{Value: 1, Better: "lower", Limit: 1.25, LimitOn: "ratio"}, false},
	} {
		if c.row.judge(); c.row.OK != c.want {
			t.Errorf("%s: got %v, want %v", c.name, c.row.OK, c.want)
		}
	}
}

func TestParseGoBench(t *testing.T) {
	got := parseGoBench(`goos: linux
BenchmarkProgramAllow/cidrs=10-2   	 1000000	       117.0 ns/op	        56.00 net-ns/op
BenchmarkProgramAllow/cidrs=10-2   	 1000000	       119.0 ns/op	        58.00 net-ns/op
BenchmarkAppend1
BenchmarkAppend1 	     200	    651300 ns/op
PASS
`)
	want := results{
		"ProgramAllow/cidrs=10": {"ns/op": {117, 119}, "net-ns/op": {56, 58}},
		"Append1":               {"ns/op": {651300}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if _, err := got.of("Append1", "rows/s"); err == nil {
		t.Error("no error for a unit that was not reported")
	}
}

// A group's rows replace its own of an earlier run and nobody else's.
func TestSave(t *testing.T) {
	rep := &report{file: filepath.Join(t.TempDir(), "build", "bench.json"), out: io.Discard, ok: true}
	for _, group := range []struct {
		name string
		rows []row
	}{
		{"agent", []row{{Name: "rss", Value: 30}}},
		{"launch", []row{{Name: "old", Value: 1}, {Name: "gone", Value: 1}}},
		{"launch", []row{{Name: "new", Value: 2, Ratio: 1.08, Against: "bare", Limit: 1, LimitOn: "ratio", Better: "lower"}}},
	} {
		rep.begin(group.name)
		for _, r := range group.rows {
			r.Bench = group.name
			rep.add(r)
		}
		if err := rep.end(0); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(rep.file)
	if err != nil {
		t.Fatal(err)
	}
	var got []map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	want := []map[string]any{
		{"bench": "launch", "name": "new", "value": 2.0, "unit": "", "ratio": 1.08, "against": "bare", "limit": 1.0, "limit_on": "ratio", "better": "lower", "ok": false},
		{"bench": "agent", "name": "rss", "value": 30.0, "unit": "", "better": "", "ok": true},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if rep.ok {
		t.Error("a limit was not met and the report is ok")
	}
}
