// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"time"
)

// series is what was measured of one thing, in the order in which it was.
type series []float64

func (s *series) add(v float64)      { *s = append(*s, v) }
func (s *series) ms(d time.Duration) { s.add(float64(d.Nanoseconds()) / 1e6) }
func (s series) p50() float64        { return s.percentile(50) }

func (s series) percentile(p int) float64 {
	if len(s) == 0 {
		return 0
	}
	v := slices.Sorted(slices.Values(s))
	if p == 50 && len(v)%2 == 0 {
		return (v[len(v)/2-1] + v[len(v)/2]) / 2
	}
	return v[min(len(v)*p/100, len(v)-1)]
}

// ratio is 0 if there is nothing to compare with; judge does not take that for
// a result.
func ratio(a, b float64) float64 {
	if b == 0 {
		return 0
	}
	return a / b
}

// pairs answers a[i]/b[i]: two things measured in the same round met the same
// machine.
func pairs(a, b series) series {
	out := make(series, min(len(a), len(b)))
	for i := range out {
		out[i] = ratio(a[i], b[i])
	}
	return out
}
