// SPDX-License-Identifier: Apache-2.0

package main

// durable measures what is on disk when a call returns: usage records in the
// node's spool and in the gateway's ledger, alone and a hundred at a time. The
// disk is that of the temporary directory; TMPDIR chooses another.
func durable(rep *report) error {
	for _, b := range []struct {
		pkg, match string
		rows       []struct{ bench, unit, name, as string }
	}{
		{"./agent/spool", "^BenchmarkAppend(1|100)$", []struct{ bench, unit, name, as string }{
			{"Append1", "ns/op", "spool_append_1", "us"},
			{"Append100", "records/s", "spool_append_100", "records/s"},
		}},
		{"./gateway/ledger", "^BenchmarkAppend$/^batch=(1|100)$", []struct{ bench, unit, name, as string }{
			{"Append/batch=1", "ns/op", "ledger_append_1", "us"},
			{"Append/batch=100", "rows/s", "ledger_append_100", "records/s"},
		}},
	} {
		res, err := goBench(rep.root, b.pkg, b.match, "200x", 5)
		if err != nil {
			return err
		}
		for _, r := range b.rows {
			s, err := res.of(r.bench, r.unit)
			if err != nil {
				return err
			}
			better := "higher"
			if r.as == "us" {
				better = "lower"
				for i := range s {
					s[i] /= 1000
				}
			}
			rep.add(row{Bench: "durable", Name: r.name, Value: s.p50(), Unit: r.as, Better: better, spread: s})
		}
	}
	return nil
}
