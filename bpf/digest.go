// SPDX-License-Identifier: Apache-2.0

// Package bpf holds the compiled datapath and the Go side of its ABI.
//
// It loads nothing by itself: netpol/enforce does. The object is compiled
// from datapath.bpf.c by go generate and committed, so that building the
// agent needs no compiler for BPF. README.md says what the programs promise.
package bpf

import "crypto/sha256"

// Digest is that of the compiled object. Programs with equal digests decide
// and count alike.
func Digest() [sha256.Size]byte {
	return sha256.Sum256(_DatapathBytes)
}
