// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"reflect"
	"strings"

	"github.com/agext/levenshtein"
	"github.com/pelletier/go-toml/v2"
)

// decodeError turns an error of the TOML decoder into one line with a place.
func decodeError(file string, err error) *Error {
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) && len(strict.Errors) > 0 {
		first := &strict.Errors[0]
		line, _ := first.Position()
		key := strings.Join(first.Key(), ".")
		msg := fmt.Sprintf("unknown key %q", key)
		if near := nearest(key, keys(reflect.TypeFor[Config](), "")); near != "" {
			msg += fmt.Sprintf("; did you mean %q?", near)
		}
		return &Error{File: file, Line: line, Msg: msg}
	}
	var decode *toml.DecodeError
	if errors.As(err, &decode) {
		line, _ := decode.Position()
		return &Error{File: file, Line: line, Msg: strings.TrimPrefix(decode.Error(), "toml: ")}
	}
	return &Error{File: file, Msg: strings.TrimPrefix(err.Error(), "toml: ")}
}

// keys lists every key of t, dotted.
func keys(t reflect.Type, prefix string) []string {
	var out []string
	for f := range t.Fields() {
		tag := f.Tag.Get("toml")
		if tag == "" {
			continue
		}
		out = append(out, prefix+tag)
		if f.Type.Kind() == reflect.Struct {
			out = append(out, keys(f.Type, prefix+tag+".")...)
		}
	}
	return out
}

// nearest answers the known key that key was most likely meant to be, or
// nothing if none is close. A key in the wrong table is close as well.
func nearest(key string, known []string) string {
	best, bestDist := "", 4
	for _, k := range known {
		if last(k) == last(key) {
			return k
		}
		if d := levenshtein.Distance(key, k, nil); d < bestDist {
			best, bestDist = k, d
		}
	}
	return best
}

func last(key string) string { return key[strings.LastIndexByte(key, '.')+1:] }
