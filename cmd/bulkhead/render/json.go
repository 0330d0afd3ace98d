// SPDX-License-Identifier: Apache-2.0

package render

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// protojson adds a random space now and then so that nobody depends on its
// bytes; compacting takes it away again.
var options = protojson.MarshalOptions{UseProtoNames: true, EmitDefaultValues: true}

// Object is m as one JSON object. Field names are those of the .proto files;
// fields with default values are there too. 64-bit integers are strings, as
// protobuf's JSON mapping has it. Fields of extra are added at the end.
func Object(m proto.Message, extra ...Field) ([]byte, error) {
	raw, err := options.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", m.ProtoReflect().Descriptor().Name(), err)
	}
	var b bytes.Buffer
	if err := json.Compact(&b, raw); err != nil {
		return nil, err
	}
	if len(extra) == 0 {
		return b.Bytes(), nil
	}
	more, err := fields(extra)
	if err != nil {
		return nil, err
	}
	out := bytes.TrimSuffix(b.Bytes(), []byte("}"))
	if len(out) > 1 {
		out = append(out, ',')
	}
	return append(out, more[1:]...), nil
}

// Field is one field of a JSON object, in order.
type Field struct {
	Name  string
	Value any
}

// Fields is one JSON object with its fields in the order given.
func fields(fs []Field) ([]byte, error) {
	b := []byte{'{'}
	for i, f := range fs {
		if i > 0 {
			b = append(b, ',')
		}
		name, err := json.Marshal(f.Name)
		if err != nil {
			return nil, err
		}
		value, err := json.Marshal(f.Value)
		if err != nil {
			return nil, err
		}
		b = append(append(append(b, name...), ':'), value...)
	}
	return append(b, '}'), nil
}

// JSON writes m on a line of its own.
func JSON(w io.Writer, m proto.Message, extra ...Field) error {
	b, err := Object(m, extra...)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// JSONFields writes an object made of fs on a line of its own.
func JSONFields(w io.Writer, fs ...Field) error {
	b, err := fields(fs)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// JSONAll writes one object a line.
func JSONAll[M proto.Message](w io.Writer, ms []M) error {
	for _, m := range ms {
		if err := JSON(w, m); err != nil {
			return err
		}
	}
	return nil
}
