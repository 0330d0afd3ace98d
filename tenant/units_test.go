// SPDX-License-Identifier: Apache-2.0

package tenant

import (
	"math"
	"testing"
)

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{
		"0": 0, "4096": 4096, "4096B": 4096, "1KiB": 1024, "64MiB": 64 << 20, "8GiB": 8 << 30, "8 GiB": 8 << 30,
		"2TiB": 2 << 40, "1.5GiB": 3 << 29, "0.5KiB": 512, "512m": 512 << 20, "512Mi": 512 << 20, "1g": 1 << 30, "1G": 1 << 30,
		"9223372036854775807": math.MaxInt64,
	} {
		got, err := ParseSize(in)
		if err != nil || got != want {
			t.Errorf("%q: got %d, %v, want %d", in, got, err, want)
		}
	}
	for in, want := range map[string]string{
		"":                    `size "": has no number that can be read`,
		"GiB":                 `size "GiB": has no number that can be read`,
		"1GB":                 `size "1GB": GB is ambiguous, write 1GiB for steps of 1024`,
		"1.5mb":               `size "1.5mb": mb is ambiguous, write 1.5MiB for steps of 1024`,
		"5 apples":            `size "5 apples": write a number and one of B, KiB, MiB, GiB, TiB, as in 512MiB`,
		"-1":                  `size "-1": write a number and one of B, KiB, MiB, GiB, TiB, as in 512MiB`,
		"1e3":                 `size "1e3": write a number and one of B, KiB, MiB, GiB, TiB, as in 512MiB`,
		"1..5GiB":             `size "1..5GiB": has no number that can be read`,
		".5GiB":               `size ".5GiB": has no number that can be read`,
		"5.GiB":               `size "5.GiB": has no number that can be read`,
		"0.1KiB":              `size "0.1KiB": is finer than can be counted`,
		"9223372036854775808": `size "9223372036854775808": is too large`,
		"8388608TiB":          `size "8388608TiB": is too large`,
	} {
		if got, err := ParseSize(in); err == nil || err.Error() != want {
			t.Errorf("%q: got %d, %v, want %s", in, got, err, want)
		}
	}
}

func TestParseCPU(t *testing.T) {
	for in, want := range map[string]int64{"0": 0, "4": 4000, "0.5": 500, "500m": 500, "1.25": 1250, "0.001": 1, "1m": 1, "1.500000": 1500} {
		got, err := ParseCPU(in)
		if err != nil || got != want {
			t.Errorf("%q: got %d, %v, want %d", in, got, err, want)
		}
	}
	for in, want := range map[string]string{
		"":       `cpu "": has no number that can be read`,
		"0.0001": `cpu "0.0001": is finer than can be counted`,
		"0.5m":   `cpu "0.5m": is finer than can be counted`,
		"-1":     `cpu "-1": write a number of CPUs, as in 2 or 0.5, or thousandths, as in 500m`,
		"50%":    `cpu "50%": write a number of CPUs, as in 2 or 0.5, or thousandths, as in 500m`,
		"two":    `cpu "two": write a number of CPUs, as in 2 or 0.5, or thousandths, as in 500m`,
	} {
		if got, err := ParseCPU(in); err == nil || err.Error() != want {
			t.Errorf("%q: got %d, %v, want %s", in, got, err, want)
		}
	}
}
